"""The gradients of our step against plain float32 autograd on the same batch, for each method.

The reference has no PEFT, no checkpointing, no accumulation and no code of the objective: the base
transformer of diffusers, called with weights that are formulas of the trained parameters, on one
batch, and the loss written out. Ours is the run's: checkpointing, one clip at a time, masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import CLASS_WORD, METHODS, PLACEHOLDER, RunFile
from torch import Tensor, nn
from torch.func import functional_call

from onewan.arithmetic.condition_shares import Given
from onewan.arithmetic.layer_names import block_of
from onewan.config.objective import LossSection
from onewan.config.schema import ResolvedRun
from onewan.data.loader import Batch, StepBatches
from onewan.formats.lora_files import parse_adapter
from onewan.media import VIDEO_SUFFIXES, probe
from onewan.model.forward import token_timesteps
from onewan.model.load import WanModelLoader
from onewan.model.wan import WanModel
from onewan.train.objective import velocity_loss
from onewan.train.run import Run
from onewan.train.setup import WanModelSetup
from onewan.train.step import NoisedInputs, backward, compute_loss, predict
from onewan.train.trainables import AdapterTraining, EmbeddingTraining
from onewan.variants import VARIANTS, ExpertName

VARIANT_CASES = [(m, v) for m in METHODS for v in VARIANTS]


@pytest.fixture(scope="module")
def masked_clips(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The named clips, half of each masked out."""
    folder = tmp_path_factory.mktemp("masked")
    for file in (workshop / "named clips").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
        if file.suffix[1:] in VIDEO_SUFFIXES:
            size = probe(file)
            ramp = np.tile(np.linspace(0, 255, size.width, dtype=np.uint8), (size.height, 1))
            Image.fromarray(ramp).save(folder / f"{file.stem}.mask.png")
    return folder


@pytest.mark.parametrize(("method", "variant"), VARIANT_CASES)
def test_gradients_equal_those_of_plain_autograd(
    run_file: RunFile, masked_clips: Path, method: str, variant: str
) -> None:
    config = run_file(
        variant,
        *(s for s in METHODS[method] if "bfloat16" not in s and "max_grad_norm" not in s),
        *(["method={kind: fine_tune}"] if method == "fine_tune" else []),
        f"video_data.sources=[{{path: {masked_clips}, loss_weight: 2.5}}]",
        "video_data.masks=true",
        "train.accumulation=3",
        "train.loss.unmasked_weight=0.2",
    )
    run = WanModelSetup(config).build()
    perturb(run)
    step = with_clean_frames(run, one_by_one(run))
    assert any(b.mask is not None for b in step.batches)
    losses, _, _ = backward(run, step, run.bring_expert(step.expert))
    ours = {
        name: parameter.grad
        for trainable in run.state.trainables_of(step.expert)
        for name, parameter in trainable.weights.parameters.items()
    }
    loss, theirs = reference(run, config, step)
    assert float(sum(losses)) == pytest.approx(float(loss), rel=1e-5)
    assert ours.keys() == theirs.keys() and ours
    together, plain = (torch.cat([g[n].flatten() for n in theirs]) for g in (ours, theirs))
    assert float((together - plain).norm() / plain.norm()) < 1e-5
    for name, gradient in theirs.items():
        # Where terms nearly cancel, both gradients are mostly float32 rounding error.
        bound = 1e-4 * float(gradient.norm()) + 1e-6 * float(plain.norm())
        assert float((ours[name] - gradient).norm()) < bound, name


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft"])
def test_kept_predictions_have_the_gradients_of_plain_autograd(
    run_file: RunFile, method: str, variant: str
) -> None:
    """Loss = loss of the clip + w * loss against the base model's velocity for the class word."""
    config = run_file(
        variant,
        *METHODS[method],
        *CLASS_WORD,
        "train.preservation_weight=2000",
        *(["train.condition_shares={none: 1}"] if variant == "ti2v-5b" else []),
        "train.accumulation=3",
    )
    run = WanModelSetup(config).build()
    perturb(run)
    step = one_by_one(run)
    assert all("ohwx" in batch.captions[0] for batch in step.batches)
    # A batch without anything to keep, such as one whose caption was dropped.
    step = replace(step, batches=(*step.batches[:2], replace(step.batches[2], preserved=None)))
    losses, preservation, _ = backward(run, step, run.bring_expert(step.expert))
    ours = {
        name: parameter.grad
        for trainable in run.state.trainables_of(step.expert)
        for name, parameter in trainable.weights.parameters.items()
    }
    base = WanModelLoader().load(config.model.path)
    transformer = base.transformer.eval()
    leaves, weights, text = formulas(run, step.expert, transformer, base)
    expected, kept = torch.zeros(()), torch.zeros(())
    for batch in step.batches:
        sample = run.objective.add_noise(batch, step, run.state.experts[step.expert].expert)
        hidden = sample.x
        if batch.condition is not None:
            hidden = torch.cat([sample.x, batch.condition], dim=1)

        def velocity(used: dict[str, Tensor], caption: str, hidden: Tensor, t: Tensor) -> Tensor:
            inputs = (hidden, 1000 * t, text([caption]))
            return functional_call(transformer, used, inputs, {"return_dict": False})[0]

        caption, t = batch.captions[0], sample.t
        predicted = velocity(weights, caption, hidden, t)
        expected = expected + (predicted - sample.target).square().mean() / 3
        if batch.preserved is not None:
            other = caption.replace("ohwx", "shape")
            with torch.no_grad():
                target = velocity({}, other, hidden, t)
            difference = velocity(weights, other, hidden, t) - target
            kept = kept + 2000 * difference.square().mean() / 3
    of_clips, of_class = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(part, list(leaves.values()), retain_graph=True)
            ]
        )
        for part in (expected, kept)
    )
    # The weight is so large that both count: the adapter has hardly moved.
    assert 0.1 < float(of_class.norm() / of_clips.norm()) < 1000
    expected, kept = expected.detach(), kept.detach()
    assert float(sum(losses)) == pytest.approx(float(expected), rel=1e-5)
    assert float(sum(preservation)) == pytest.approx(float(kept), rel=1e-4)
    assert len(preservation) == 2
    together, plain = torch.cat([ours[name].flatten() for name in leaves]), of_clips + of_class
    assert float((together - plain).norm() / plain.norm()) < 3e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_wan_settings_apply_to_each_method(
    run_file: RunFile, workshop: Path, method: str
) -> None:
    config = run_file(
        "ti2v-5b",
        *METHODS[method],
        f"video_data.sources=[{{path: {workshop / 'named clips'}}}]",
        "wan_config.use_temporal_attention=false",
        "wan_config.transformer_layers_to_train=[1]",
        "wan_config.temporal_consistency_weight=3.0",
    )
    run = WanModelSetup(config).build()
    trained = run.bring_expert("single")
    if trained.method is None:
        assert method == "embedding"
    else:
        assert {block_of(name) for name in trained.method.parameters} == {1}
    perturb(run)
    trained.transformer.train()
    step = one_by_one(run)
    batch = step.batches[0]
    sample = run.objective.add_noise(batch, step, trained.expert)
    with torch.no_grad():
        text = run.text(batch)
        (before,) = predict(run, trained, [NoisedInputs(batch, sample, text)])
        loss, plain = (
            compute_loss(run, sample, before),
            velocity_loss(before, sample, LossSection(), 1),
        )
        sample.x[:, :, 1] += 1
        (after,) = predict(run, trained, [NoisedInputs(batch, sample, text)])
        change = (after - before).abs()
    moved = change.amax(dim=(0, 1, 3, 4))
    assert moved[1] > 1e-3 and moved[0] < 1e-2 * moved[1]
    assert loss != plain


def perturb(run: Run) -> None:
    """Change the trained parameters, since at its start half of a LoRA's gradients are zero."""
    generator = torch.Generator().manual_seed(5)
    for trainable in run.state.trainables:
        if isinstance(trainable.weights, EmbeddingTraining):
            continue
        for parameter in trainable.weights.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.02 * noise.to(parameter.dtype)


def one_by_one(run: Run) -> StepBatches:
    """Three clips of one shape, a batch each."""
    batches = run.loader.validation_batches(run.dataset.clips, 99)
    shape = max((b.latents.shape for b in batches), key=lambda s: s[2])
    chosen = [b for b in batches if b.latents.shape == shape][:3]
    assert len(chosen) == 3
    return StepBatches(
        number=3,
        expert=next(iter(run.state.experts)),
        batches=tuple(replace(batch, first_sample_index=i) for i, batch in enumerate(chosen)),
        global_size=3,
    )


def with_clean_frames(run: Run, step: StepBatches) -> StepBatches:
    """`step` whose samples are given frames of each kind, if these are among the latents."""
    if not run.objective.clean_frames:
        return step
    given: tuple[Given, ...] = ("first", "both", "last")
    batches = [
        replace(batch, given=(each,), last_frame=batch.latents[:, :, 0] if n else None)
        for n, (batch, each) in enumerate(zip(step.batches, given, strict=True))
    ]
    return replace(step, batches=tuple(batches))


def reference(run: Run, config: ResolvedRun, step: StepBatches) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients by name, computed by plain autograd."""
    base = WanModelLoader().load(config.model.path)
    transformer = base.transformer.eval()
    leaves, weights, text = formulas(run, step.expert, transformer, base)
    samples = [
        run.objective.add_noise(batch, step, run.state.experts[step.expert].expert)
        for batch in step.batches
    ]
    x, t, target = (torch.cat([getattr(s, name) for s in samples]) for name in ("x", "t", "target"))
    clean = torch.zeros(len(samples), x.shape[2], dtype=torch.bool)
    for index, sample in enumerate(samples):
        if sample.clean_frames is not None:
            clean[index] = sample.clean_frames[0]
    timestep = token_timesteps(t, clean, x) if clean.any() else t * 1000
    hidden = x
    if step.batches[0].condition is not None:
        hidden = torch.cat([x, torch.cat([b.condition for b in step.batches])], dim=1)
    captions = [b.captions[0] for b in step.batches]
    (prediction,) = functional_call(
        transformer, weights, (hidden, timestep, text(captions)), {"return_dict": False}
    )
    total = torch.zeros(())
    for index, batch in enumerate(step.batches):
        error = (prediction[index] - target[index]) ** 2
        loss_mask = torch.ones_like(error[:1]) if batch.mask is None else batch.mask[0]
        loss_mask = loss_mask + 0.2 * (1 - loss_mask)
        loss_mask = loss_mask * ~clean[index][:, None, None]
        weighted_error = (error * loss_mask).sum() / (loss_mask.sum() * len(error))
        total = total + 2.5 * weighted_error / len(step.batches)
    gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return total.detach(), {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), gradients, strict=True)
    }


def formulas(
    run: Run, expert: ExpertName, transformer: nn.Module, base: WanModel
) -> tuple[dict[str, Tensor], dict[str, Tensor], Callable[[list[str]], Tensor]]:
    """The trained parameters as leaves; the transformer's weights as formulas of them; the text."""
    plain = dict(transformer.named_parameters())
    trained = run.state.experts[expert].method
    if trained is None:
        return embedding_formulas(run, base)

    def text(captions: list[str]) -> Tensor:
        return base.encode_text(captions)

    leaves = {
        name: p.detach().clone().requires_grad_(True) for name, p in trained.parameters.items()
    }
    if not isinstance(trained, AdapterTraining):
        return leaves, {**plain, **leaves}, text
    settings = next(iter(run.model.transformer.peft_config.values())).to_dict()
    weights = dict(plain)
    named = {name.replace(".default", ""): leaf for name, leaf in leaves.items()}
    for module, adapter in parse_adapter(named, settings, source="leaves").items():
        weight = plain[f"{module}.weight"]
        changed = weight + adapter.difference(weight)
        if "magnitude" in adapter.tensors:
            # The length |W + s B A| is a constant to DoRA's gradient (section 4.3 of the paper).
            low = adapter.scale * adapter.tensors["lora_B"] @ adapter.tensors["lora_A"]
            length = (weight + low).norm(dim=1, keepdim=True).detach()
            changed = (weight + low) * (adapter.tensors["magnitude"].reshape(-1, 1) / length)
        weights[f"{module}.weight"] = changed
    return leaves, weights, text


def embedding_formulas(
    run: Run, base: WanModel
) -> tuple[dict[str, Tensor], dict[str, Tensor], Callable[[list[str]], Tensor]]:
    """The placeholder's vectors inserted among the table's rows, the encoder called directly."""
    (learned,) = run.model.all_embeddings()
    leaf = learned.vectors.detach().clone().requires_grad_(True)
    table = base.text_encoder.get_input_embeddings().weight

    def one(caption: str) -> Tensor:
        rows: list[Tensor] = []
        for number, piece in enumerate(caption.split(learned.placeholder)):
            if number:
                rows.append(leaf)
            if piece.strip():
                ids = base.tokenizer(piece.strip(), add_special_tokens=False).input_ids
                rows.append(table[torch.tensor(ids)])
        rows.append(table[base.tokenizer.eos_token_id][None])
        inputs = torch.cat(rows)[None]
        encoded = base.text_encoder.eval()(inputs_embeds=inputs).last_hidden_state[0]
        return torch.cat([encoded, encoded.new_zeros(512 - len(encoded), encoded.shape[1])])

    return (
        {learned.name: leaf},
        {},
        lambda captions: torch.stack([one(caption) for caption in captions]),
    )


def test_micro_batches_give_the_gradients_of_one_large_batch(run_file: RunFile) -> None:
    """With stratified timesteps, perturbed noise and conditioning frames too: draws depend on the
    sample's index in the step, not on its micro-batch."""
    config = run_file(
        "ti2v-5b",
        "train.timesteps={distribution: logit_normal, stratified: true}",
        "train.noise_offset=0.1",
        "train.input_perturbation=0.1",
        "train.condition_shares={first: 0.5, none: 0.5}",
        "train.first_frame_noise=[-3.5, 0.5]",
        PLACEHOLDER.replace("<shape>", "square"),
    )
    found = []
    for sizes in ((1, 1, 1), (3,), (2, 1)):
        run = WanModelSetup(config).build()
        perturb(run)
        step = one_by_one(run) if sizes == (1, 1, 1) else joined(one_by_one(run), sizes)
        losses, _, levels = backward(run, step, run.bring_expert(step.expert))
        gradients = torch.cat(
            [
                p.grad.flatten()
                for trainable in run.state.trainables
                for p in trainable.weights.parameters.values()
            ]
        )
        found.append((float(sum(losses)), levels, gradients))
    for loss, levels, gradients in found[1:]:
        assert levels == found[0][1]
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        assert float((gradients - found[0][2]).norm() / found[0][2].norm()) < 1e-5


def joined(step: StepBatches, sizes: tuple[int, ...]) -> StepBatches:
    batches, start = [], 0
    for size in sizes:
        part = step.batches[start : start + size]
        batches.append(
            Batch(
                latents=torch.cat([b.latents for b in part]),
                text=None,
                condition=None,
                mask=None,
                loss_weights=tuple(w for b in part for w in b.loss_weights),
                timesteps=tuple(each for b in part for each in b.timesteps),
                is_prior=None,
                given=tuple(g for b in part for g in b.given),
                last_frame=None,
                captions=tuple(c for b in part for c in b.captions),
                names=tuple(n for b in part for n in b.names),
                first_sample_index=start,
            )
        )
        start += size
    return replace(step, batches=tuple(batches))
