"""Learned vectors in prompts, and their gradients through the text encoder."""

from __future__ import annotations

import copy

import pytest
import torch
from support import placeholders
from support.placeholders import BOTH, FOX, INK, end, ids, learned, rows
from torch import Tensor, nn
from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

from onewan.errors import CheckpointError
from onewan.model.embedding import WanModelEmbedding
from onewan.model.text import checkpoint_encoder, mentions, pad_text
from onewan.model.wan import WanModel

# Fixtures are found by pytest as attributes of the module.
model_folder, load, model = placeholders.model_folder, placeholders.load, placeholders.model


def encoded(model: WanModel, inputs_LD: Tensor) -> Tensor:
    """The encoder's outputs for input vectors, called directly: no mask, no checkpointing."""
    _, encoder = model.prompt_encoder()
    return encoder(inputs_embeds=inputs_LD[None]).last_hidden_state[0]


# ------------------------------------------------------------------------------------- in prompts


def test_vectors_equal_to_the_table_rows_of_a_word_give_the_bits_of_the_word(model):
    """So a placeholder differs from a word by the values of its vectors alone."""
    plain = model.encode_prompt("a red square moves slowly")
    red = ids(model, "red square")
    table = rows(model, red).clone()
    model.add_embedding(
        WanModelEmbedding(placeholder=FOX, name="fox", uuid="1", vectors=nn.Parameter(table))
    )
    assert len(red) > 2
    assert torch.equal(model.encode_prompt("a <fox> moves slowly"), plain)
    assert torch.equal(model.encode_prompt("a   <fox>\n moves slowly "), plain)
    assert torch.equal(model.encode_prompt("a &lt;fox&gt; moves slowly"), plain)


def test_input_vectors_replace_the_placeholder(model):
    fox = learned(count=3)
    model.add_embedding(fox)
    with torch.no_grad():
        got = model.encode_prompt("the quick <fox> jumps")
        parts = rows(model, ids(model, "the quick")), fox.vectors, rows(model, ids(model, "jumps"))
        want = encoded(model, torch.cat([*parts, rows(model, end(model))]))
    assert torch.equal(got, want)


def test_output_vectors_change_no_other_output(model):
    plain = model.encode_prompt("the quick jumps")
    fox = learned(count=3, is_output=True)
    model.add_embedding(fox)
    before = len(ids(model, "the quick"))
    for number in range(2):
        with torch.no_grad():
            fox.vectors.add_(number)  # as if it had trained
            got = model.encode_prompt("the quick <fox> jumps")
        assert torch.equal(got[before : before + 3], fox.vectors)
        assert torch.equal(torch.cat([got[:before], got[before + 3 :]]), plain)


def test_prompts_without_a_placeholder_keep_their_bits(load):
    model, untouched = load(), load()
    _, encoder = model.prompt_encoder()
    weights = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    prompts = ["", "a red square", "the fox, <fo x>; " * 9, "x " * 600]
    for embedding in (learned(), learned(INK, is_output=True)):
        model.add_embedding(embedding)
    assert not model.encode_text(["<fox> and <ink>"]).isnan().any()
    for prompt in prompts:
        got = model.encode_prompt(prompt)
        assert torch.equal(got, untouched.encode_prompt(prompt)) and not got.requires_grad
    assert all(torch.equal(weights[name], weight) for name, weight in encoder.state_dict().items())
    tokenizer, _ = model.prompt_encoder()
    assert len(tokenizer) == len(untouched.prompt_encoder()[0])


@pytest.mark.parametrize("kinds", [(False, False), (False, True), (True, False), (True, True)])
def test_two_placeholders_in_one_prompt_are_both_replaced(model, kinds):
    fox, ink = learned(is_output=kinds[0]), learned(INK, 1, is_output=kinds[1], seed=1)
    for embedding in (fox, ink):
        model.add_embedding(embedding)
    assert model.all_embeddings() == [fox, ink]
    words = [rows(model, ids(model, text)) for text in ("a", "over", "by the river")]
    order = [words[0], ink, words[1], fox, fox, words[2], ink, rows(model, end(model))]
    with torch.no_grad():
        got = model.encode_prompt("a <ink> over <fox><fox> by the river<ink>")
        entering = [
            part if isinstance(part, Tensor) else part.vectors
            for part in order
            if isinstance(part, Tensor) or not part.is_output_embedding
        ]
        rest = encoded(model, torch.cat(entering))
    for part in order:
        output = not isinstance(part, Tensor) and part.is_output_embedding
        size = len(part) if isinstance(part, Tensor) else len(part.vectors)
        if output:
            assert torch.equal(got[:size], part.vectors)
        else:
            assert torch.equal(got[:size], rest[:size])
            rest = rest[size:]
        got = got[size:]
    assert len(got) == len(rest) == 0


def test_punctuation_beside_a_placeholder_is_tokenized_separately(model):
    """As in ComfyUI, so that vectors trained here have the same meaning there."""
    fox = learned()
    model.add_embedding(fox)
    with torch.no_grad():
        got = model.encode_prompt("the dog (<fox>), said")
        parts = (
            rows(model, ids(model, "the dog (")),
            fox.vectors,
            rows(model, ids(model, "), said")),
        )
        assert torch.equal(got, encoded(model, torch.cat([*parts, rows(model, end(model))])))


@pytest.mark.parametrize(
    ("placeholder", "prompt", "found"),
    [
        ("sks", "a sks dog", True),
        ("sks", "sks", True),
        ("sks", "(sks), SKS", True),
        ("sks", "he asks for masks and sks2 and sks_b", False),
        ("sks", "SKS", False),
        ("sks", "一只sks在跑", True),
        ("<fox>", "two<fox>es", True),
        ("<fox>", "a &lt;fox&gt;", True),
        ("*a.b*", "x *a.b* y", True),
        ("*a.b*", "x *aXb* y", False),
        ("sks", "", False),
    ],
)
def test_a_placeholder_is_found_as_a_whole_word(model, placeholder, prompt, found):
    assert mentions(prompt, placeholder) is found
    plain = model.encode_prompt(prompt)
    embedding = learned(placeholder, 5, is_output=True)
    model.add_embedding(embedding)
    got = model.encode_prompt(prompt)
    if found:
        assert any(torch.equal(got[n : n + 5], embedding.vectors) for n in range(len(got)))
    else:
        assert torch.equal(got, plain)


def test_the_longer_of_two_placeholders_with_the_same_start_is_found(model):
    fox, foxes = learned("fox!"), learned("fox!!", 4)
    model.embedding, model.additional_embeddings = fox, [foxes]
    with torch.no_grad():
        got = model.encode_prompt("fox!!")
        assert torch.equal(got, encoded(model, torch.cat([foxes.vectors, rows(model, end(model))])))


@BOTH
@pytest.mark.parametrize("words", [505, 509, 510, 511, 600])
def test_prompts_are_truncated_to_512_tokens_and_end_with_the_end_token(model, is_output, words):
    one = ids(model, "a")
    assert len(one) == 1 and len(ids(model, "a a")) == 2
    fox = learned(count=4, is_output=is_output)
    model.add_embedding(fox)
    with torch.no_grad():
        late = model.encode_prompt("a " * words + FOX)
        early = model.encode_prompt(FOX + " a" * words)
        fitting = min(4, max(0, 511 - words))
        before = rows(model, one * min(words, 511))
        parts = [before, *([] if is_output else [fox.vectors[:fitting]]), rows(model, end(model))]
        want = encoded(model, torch.cat(parts))
    assert len(late) == min(512, words + 5) and len(early) == min(512, words + 5)
    if is_output:
        assert torch.equal(late[len(before) : len(before) + fitting], fox.vectors[:fitting])
        late = torch.cat([late[: len(before)], late[-1:]])
        assert torch.equal(early[:4], fox.vectors)
    assert torch.equal(late, want)


def test_prompts_are_padded_with_zeros_to_512(model):
    model.add_embedding(learned())
    text = model.encode_text(["a <fox>", "", "a red square"])
    assert text.shape == (3, 512, 64) and text.requires_grad
    lengths = [len(model.encode_prompt(p)) for p in ("a <fox>", "", "a red square")]
    for row, length, prompt in zip(text, lengths, ("a <fox>", "", "a red square"), strict=True):
        assert torch.equal(row[:length], model.encode_prompt(prompt)) and not row[length:].any()
    assert torch.equal(pad_text([torch.ones(512, 2)]), torch.ones(1, 512, 2))


def test_vectors_of_another_encoder_are_refused(model):
    wide = nn.Parameter(torch.zeros(2, 4096))
    for is_output in (False, True):
        model.embedding = WanModelEmbedding(
            placeholder=FOX, name="fox", uuid="1", vectors=wide, is_output_embedding=is_output
        )
        with pytest.raises(CheckpointError, match="have 4096 values and the text encoder's 64"):
            model.encode_prompt("a <fox>")


# ------------------------------------------------------------------------------------- in training


def loss_of(model: WanModel, prompts: list[str]) -> Tensor:
    text = model.encode_text(prompts)
    weights = torch.randn(text.shape[1:], generator=torch.Generator().manual_seed(5))
    return (text.float() * weights).square().mean() * 1000


def normalized(norm: UMT5LayerNorm, hidden: Tensor) -> Tensor:
    scale = (hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return norm.weight * (hidden * scale)


@BOTH
def test_gradient_equals_finite_differences(model, is_output, monkeypatch):
    fox = learned(is_output=is_output)
    model.add_embedding(fox)
    checkpoint_encoder(model.prompt_encoder()[1])
    prompts = ["the <fox> jumps", "a small blue circle", "<fox>, <fox>"]
    loss_of(model, prompts).backward()
    assert fox.vectors.grad is not None
    exact = fox.vectors.grad.double()
    model.prompt_encoder()[1].double()
    # transformers computes this norm in float32 whatever the dtype, which is too coarse here; and
    # so did transformers 5.5 with the softmax.
    monkeypatch.setattr(UMT5LayerNorm, "forward", normalized)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    values = fox.vectors.detach().double()
    direction = torch.randn(2, 64, generator=torch.Generator().manual_seed(9)).double()
    # The class accepts float32 only; finite differences need float64, so set the data directly.
    ends = []
    for step in (1e-5, -1e-5):
        fox.vectors.data = values + step * direction
        with torch.no_grad():
            text = model.encode_text(prompts)
            weights = torch.randn(text.shape[1:], generator=torch.Generator().manual_seed(5))
            ends.append((text * weights).square().mean() * 1000)
    slope = (ends[0] - ends[1]) / 2e-5
    assert (exact * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_equals_plain_autograd(load, dtype):
    """Through the model, padded and checkpointed, against the encoder called directly."""
    model = load(dtype)
    _, encoder = model.prompt_encoder()
    plain = copy.deepcopy(encoder)
    fox, ink = learned(), learned(INK, 1, is_output=True, seed=1)
    for embedding in (fox, ink):
        model.add_embedding(embedding)
    checkpoint_encoder(encoder)
    text = model.encode_text(["the <fox> <ink> jumps"])
    assert text.dtype == dtype
    weights = torch.randn(text.shape[1:], generator=torch.Generator().manual_seed(5))
    (text.float() * weights).square().sum().backward()

    own, out = (e.vectors.detach().clone().requires_grad_() for e in (fox, ink))
    before, after = ids(model, "the"), [*ids(model, "jumps"), *end(model)]
    inputs = torch.cat([plain.shared.weight[before], own.to(dtype), plain.shared.weight[after]])
    outputs = plain(inputs_embeds=inputs[None]).last_hidden_state[0]
    position = len(before) + 2
    want = torch.cat([outputs[:position], out.to(dtype), outputs[position:]])
    assert torch.equal(text[0, : len(want)], want)
    (want.float() * weights[: len(want)]).square().sum().backward()
    for embedding, reference in ((fox, own), (ink, out)):
        got = embedding.vectors.grad
        assert got is not None and got.dtype == torch.float32 and got.abs().max() > 0
        torch.testing.assert_close(got, reference.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_no_bit_and_draws_no_random_number(load, dtype):
    kept: list[Tensor] = []
    saved: list[int] = []
    for checkpointed in (False, True):
        model = load(dtype)
        _, encoder = model.prompt_encoder()
        encoder.requires_grad_(True)
        if checkpointed:
            checkpoint_encoder(encoder)
            checkpoint_encoder(encoder)  # a second call changes nothing
        else:
            encoder.requires_grad_(False)
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
        fox = learned()
        model.add_embedding(fox)
        bytes_kept = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal bytes_kept
            bytes_kept += tensor.nbytes
            return tensor

        calls = 0

        def called(*_: object) -> None:
            nonlocal calls
            calls += 1

        encoder.encoder.block[1].layer[0].register_forward_hook(called)
        state = torch.get_rng_state()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            text = model.encode_prompt("the quick <fox> jumps over the lazy dog")
        loss = text.float().square().mean()
        loss.backward()
        assert calls == 1 + checkpointed
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module.training for module in encoder.modules())
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert fox.vectors.grad is not None
        kept += [loss.detach(), fox.vectors.grad]
        saved.append(bytes_kept)
    assert torch.equal(kept[0], kept[2]) and torch.equal(kept[1], kept[3])
    assert saved[1] < saved[0] / 4


def test_a_copy_of_a_checkpointed_encoder_uses_its_own_weights(model):
    _, encoder = model.prompt_encoder()
    checkpoint_encoder(encoder)
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        twin.encoder.block[0].layer[0].layer_norm.weight.mul_(2)
        tokens = torch.tensor([end(model)])
        assert not torch.equal(twin(tokens).last_hidden_state, encoder(tokens).last_hidden_state)


def test_gradients_are_recorded_only_for_vectors_that_require_them(model):
    fox, ink = learned(), learned(INK, is_output=True)
    for embedding in (fox, ink):
        model.add_embedding(embedding)
    with torch.no_grad():
        assert not model.encode_text(["<fox> <ink>"]).requires_grad
    assert model.encode_text(["<ink>"]).requires_grad
    fox.vectors.requires_grad_(False)
    graph_inputs: list[bool] = []
    _, encoder = model.prompt_encoder()
    encoder.encoder.block[0].register_forward_hook(
        # transformers 5.5 returns a tuple
        lambda _module, _inputs, output: graph_inputs.append(next(iter(output)).requires_grad)
    )
    assert model.encode_text(["<fox> <ink>"]).requires_grad
    ink.vectors.requires_grad_(False)
    assert not model.encode_text(["<fox> <ink>"]).requires_grad
    assert graph_inputs == [False, False], "the encoder recorded a graph that no vector needs"


@BOTH
def test_training_moves_vectors_towards_the_embedding_of_a_word(model, is_output):
    target = model.encode_prompt("a small blue circle")
    model.add_embedding(
        WanModelEmbedding.initial(
            model,
            placeholder=FOX,
            initial_text="the lazy dog",
            token_count=len(ids(model, "blue")),
            is_output_embedding=is_output,
        )
    )
    fox = model.embedding
    optimizer = torch.optim.Adam([fox.vectors], lr=0.05)
    losses = []
    for _ in range(60):
        loss = (model.encode_prompt("a small <fox> circle") - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
