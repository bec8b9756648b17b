"""The cross-field rules of a run file: a case for each, and combinations that they accept."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from onewan.config import load_run
from onewan.config.clips import SourceSection
from onewan.config.method import (
    EmbeddingMethod,
    FineTuneMethod,
    LohaMethod,
    LoraMethod,
    PerModule,
)
from onewan.config.resolve import condition_shares
from onewan.config.schema import RunConfig
from onewan.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
T2V = "model: {path: org/model, variant: t2v-a14b}\n"
HIGH = "model: {path: org/model, variant: t2v-a14b, experts: high}\n"
I2V = "model: {path: org/model, variant: i2v-a14b}\n"
TI2V = "model: {path: org/model, variant: ti2v-5b}\n"
FLOAT32 = "model: {path: org/model, variant: t2v-a14b, dtype: float32}\n"
SOURCE = "video_data:\n  sources:\n    - {path: clips, %s}\n"
FOX = "embeddings: [{placeholder: <fox>}]\n"


def load(folder: Path, text: str) -> RunConfig:
    """The config of `text`, in a folder with a.safetensors, b.safetensors and c.safetensors."""
    for name in "abc":
        (folder / f"{name}.safetensors").touch()
    file = folder / "fox.yaml"
    file.write_text(text if text.startswith("model") else T2V + text, encoding="utf-8")
    return load_run(file)


BROKEN = [
    # Layers.
    (
        "method: {modules: [attentions]}",
        r"method.modules: must name groups, or layers by a pattern with one of \* \? \[ \., got "
        r"'attentions'; did you mean 'attention'\?",
    ),
    ("method: {modules: [norms]}", "method.modules: .* got 'norms'; adapters have self_attention"),
    (
        "memory: {gradient_checkpointing: false, resident_blocks: 3}",
        "memory.resident_blocks: needs memory.gradient_checkpointing, which is off, got 3; leave",
    ),
    (
        "memory: {gradient_checkpointing: false, keep_attention: host}",
        "memory.keep_attention: needs memory.gradient_checkpointing, which is off, got 'host'",
    ),
    (
        "method: {kind: fine_tune}\nmemory: {host_weights: mapped}",
        "memory.host_weights: trained weights can't stay in the model's file, got 'mapped'",
    ),
    ("method: {modules: [xyz]}", "method.modules: .*; the groups are self_attention, cross_att"),
    (
        "method: {kind: fine_tune, modules: [norm]}",
        r"method.modules: .*; did you mean 'norms'\?",
    ),
    ("method: {modules: [ffn, ffn]}", "method.modules: has ffn twice"),
    (
        "method: {per_module: [{modules: [fnn], rank: 2}]}",
        r"method.per_module.0.modules: .* got 'fnn'; did you mean 'ffn'\?",
    ),
    ("method: {per_module: [{modules: [ffn]}]}", "method.per_module.0: gives neither rank nor"),
    # Which parts of a video are clips.
    (
        "wan_config: {clip_lengths: [17, 33], max_frames: 33}",
        "wan_config.max_frames: has no effect, since wan_config.clip_lengths gives the numbers",
    ),
    (
        "wan_config: {frame_sample_strategy: chunks, clips_per_video: 2}",
        "wan_config.clips_per_video: has no effect, since wan_config.frame_sample_strategy is chun",
    ),
    (
        "wan_config: {stride: 1.5}",
        "wan_config.stride: has no effect, since wan_config.frame_sample_strategy is uniform",
    ),
    ("wan_config: {clip_lengths: [17, 17]}", "wan_config.clip_lengths: has 17 twice"),
    ("video_data: {sources: [{path: c, speed: 0}]}", "video_data.sources.0.speed: must be"),
    (
        "video_data: {sources: [{path: c, augment: {variants: 3}}]}",
        "video_data.sources.0.augment: changes nothing; give flip, crop, brightness",
    ),
    (
        "validation: {sources: [{path: c, augment: {flip: 1}}]}",
        "validation.sources.0.augment: has no effect, since validation takes clips as they are",
    ),
    ("method: {kind: lokr, factor: 0}", "method.factor: must be at least 1, or -1, got 0"),
    (
        TI2V.replace("}", ", boundary: 0.5}"),
        "model.boundary: has no effect, since ti2v-5b has one expert, got 0.5",
    ),
    # Adapter files to initialize from.
    (
        "method: {init_from: [no.safetensors]}",
        r"method.init_from.0: there is no file /.*/no.safetensors; correct it",
    ),
    ("method: {init_from: [a.safetensors, a.safetensors]}", "method.init_from: has /.* twice"),
    (
        "method: {init_from: [a.safetensors, b.safetensors, c.safetensors]}",
        r"method.init_from: .* got 3 for 2 experts \(high, low\); remove the others",
    ),
    (
        HIGH + "method: {init_from: [a.safetensors, b.safetensors]}",
        r"method.init_from: .* got 2 for 1 expert \(high\)",
    ),
    (
        TI2V + "method: {init_from: [a.safetensors, b.safetensors]}",
        "method.init_from: .* got 2 for 1 expert; remove",
    ),
    (
        HIGH + "method: {init_from: [a.safetensors], rank: 32}",
        "method.rank: has no effect, since the files of method.init_from decide it, got 32",
    ),
    (HIGH + "method: {init_from: [a.safetensors], alpha: 1}", "method.alpha: has no effect"),
    (
        HIGH + "method: {init_from: [a.safetensors], modules: [ffn]}",
        r"method.modules: has no effect, .*method.init_from decide it, got \['ffn'\]",
    ),
    (
        TI2V + "method: {kind: oft, init_from: [a.safetensors], block_size: 4}",
        "method.block_size: has no effect",
    ),
    (
        TI2V + "method: {init_from: [a.safetensors], per_module: [{modules: [ffn], rank: 1}]}",
        "method.per_module: has no effect",
    ),
    (
        "method: {init_from: [a.safetensors, b.safetensors]}\nper_expert: {low: {rank: 4}}",
        "per_expert.low.rank: has no effect",
    ),
    (
        HIGH + "method: {init_from: [a.safetensors]}\nper_expert: {high: {alpha: 4}}",
        "per_expert.high.alpha: has no effect",
    ),
    (
        "method: {init_from: [a.safetensors], init: pissa}",
        "method.init: initializes new adapters, .* got 'pissa'",
    ),
    (
        "method: {init_from: [a.safetensors], use_rslora: true}",
        "method.use_rslora: has no effect, .*method.init_from decide it, got true; leave it",
    ),
    ("method: {kind: lokr, init_from: [a.safetensors], factor: 4}", "method.factor: has no effect"),
    (
        "method: {kind: lokr, init_from: [a.safetensors], decompose_both: true}",
        "method.decompose_both: has no effect, .*method.init_from decide it, got true",
    ),
    # Prior preservation.
    (
        "method: {kind: loha}\noutput: {formats: [comfyui, diffusers]}",
        "output.formats: diffusers can't read loha, got",
    ),
    (
        "method: {kind: fine_tune}\nvideo_data: {sources: [{path: b, target: base}]}",
        "video_data.sources.0.target: needs an adapter .* and method.kind is fine_tune, got 'base'",
    ),
    (
        FOX + "method: {kind: embedding}\nvideo_data: {sources: [{path: b, target: base}]}",
        "video_data.sources.0.target: needs an adapter .* and method.kind is embedding, got 'base'",
    ),
    (
        "validation: {sources: [{path: b, target: base}]}",
        "validation.sources.0.target: what is measured is how well clips are learned, got 'base'",
    ),
    # A class word.
    (
        "video_data: {sources: [{path: b, class_word: dog}]}",
        "video_data.sources.0.class_word: needs the trigger_word that it stands for, got 'dog'",
    ),
    (
        "video_data: {sources: [{path: b, trigger_word: Fox, class_word: a fox}]}",
        "video_data.sources.0.class_word: must not contain the trigger word, got 'a fox'",
    ),
    (
        "video_data: {sources: [{path: b, trigger_word: x, class_word: dog, target: base}]}",
        "video_data.sources.0.class_word: target: base keeps .* anyway, got 'dog'; remove one",
    ),
    (
        "method: {kind: fine_tune}\n"
        "video_data: {sources: [{path: b, trigger_word: x, class_word: dog}]}",
        "video_data.sources.0.class_word: needs an adapter .* is fine_tune, got 'dog'; leave it",
    ),
    (
        FOX + "video_data: {sources: [{path: b, trigger_word: x, class_word: dog}]}",
        "video_data.sources.0.class_word: needs texts that stay .* embeddings are used, got 'dog'",
    ),
    (
        "validation: {sources: [{path: b, trigger_word: x, class_word: dog}]}",
        "validation.sources.0.class_word: nothing is trained on these clips, got 'dog'; leave",
    ),
    # Fine-tuning.
    (
        "method: {kind: fine_tune, fused_step: true}\n"
        "train: {accumulation: 2, max_grad_norm: null}",
        "train.accumulation: must be 1 for method.fused_step, got 2; raise train.batch_size",
    ),
    (
        "method: {kind: fine_tune, fused_step: true}",
        "train.max_grad_norm: must be null for method.fused_step, .* got 1; set it to null",
    ),
    (
        "method: {kind: fine_tune, weights: float32, fused_step: true}\n"
        "train: {max_grad_norm: null}\noptimizer: {name: adamw_cpu_offload}",
        "method.fused_step: true updates .* optimizer.name 'adamw_cpu_offload' does not support",
    ),
    (
        "method: {kind: fine_tune}\noptimizer: {name: prodigy}",
        "method.weights: stochastic updates .* optimizer.name 'prodigy' does not support: it "
        "estimates one learning rate .*, or set method.weights to float32",
    ),
    (
        FLOAT32 + "method: {kind: fine_tune, weights: kahan}",
        "method.weights: has no effect, since model.dtype is float32, got 'kahan'",
    ),
    (FLOAT32 + "method: {kind: fine_tune, weights: stochastic}", "method.weights: has no effect"),
    (
        "method: {kind: fine_tune}\noutput: {formats: [comfyui, kohya]}",
        "output.formats: kohya is a form of adapters, and method.kind is fine_tune",
    ),
    (
        "method: {kind: lokr}\noutput: {formats: [comfyui, no_alpha]}",
        "output.formats: no_alpha is for programs that read only LoRA, and method.kind is lokr",
    ),
    # Embeddings.
    ("method: {kind: embedding}", "embeddings: must have one to train .* got none; add one"),
    (
        "method: {kind: embedding}\n"
        "embeddings: [{placeholder: <a>, init_from: a.safetensors, train: false}]",
        "embeddings: must have one to train .* none of them trains; add one",
    ),
    (
        "embeddings: [{placeholder: <a>}, {placeholder: <a>}]",
        "embeddings.1.placeholder: is a duplicate, got '<a>'; change it",
    ),
    (
        "embeddings: [{placeholder: fox}, {placeholder: foxes}]",
        "embeddings.1.placeholder: must not contain another .* got 'foxes' beside 'fox'",
    ),
    (
        "embeddings: [{placeholder: foxes}, {placeholder: fox}]",
        "embeddings.1.placeholder: must not contain another .* got 'fox' beside 'foxes'",
    ),
    (
        "embeddings: [{placeholder: <fox>}, {placeholder: '[Fox]'}]",
        "embeddings.1.name: is a duplicate, got 'Fox'; change it",
    ),
    ("embeddings: [{placeholder: 狐}]", "embeddings.0.name: is required for the placeholder '狐'"),
    (
        "embeddings: [{placeholder: <a>, train: false}]",
        "embeddings.0.init_from: is required where embeddings.0.train is false, got nothing",
    ),
    (
        "embeddings: [{placeholder: <a>, init_from: a.safetensors, train: false, lr: 1}]",
        "embeddings.0.lr: has no effect, since embeddings.0.train is false, got 1",
    ),
    ("embeddings: [{placeholder: <a>, initial_text: ' '}]", "embeddings.0.initial_text: must have"),
    (
        "embeddings: [{placeholder: <a>, init_from: no.safetensors}]",
        "embeddings.0.init_from: there is no file /.*/no.safetensors",
    ),
    (
        "embeddings: [{placeholder: <a>, init_from: a.safetensors, token_count: 2}]",
        "embeddings.0.token_count: has no effect, .* embeddings.0.init_from decides it, got 2",
    ),
    (
        "embeddings: [{placeholder: <a>, init_from: a.safetensors, initial_text: fox}]",
        "embeddings.0.initial_text: has no effect",
    ),
    # Single experts.
    (
        TI2V + "per_expert: {low: {lr: 1}}",
        "per_expert.low.lr: has no effect, since ti2v-5b has one expert, got 1.0",
    ),
    (
        HIGH + "per_expert: {low: {lr: 1}}",
        r"per_expert.low.lr: .* only the high expert is trained \(model.experts\), got 1.0; "
        r"leave it",
    ),
    (
        HIGH + "per_expert: {high: {steps: 5}}",
        "per_expert.high.steps: has no effect, since only one expert is trained, "
        ".*train.steps.*, got 5",
    ),
    (
        "per_expert: {high: {steps: 5}}",
        "per_expert.low.steps: is required where per_expert.high.steps is given, got nothing",
    ),
    (
        "per_expert: {low: {steps: 5}}",
        "per_expert.high.steps: is required where per_expert.low.steps is given, got nothing",
    ),
    (
        "per_expert: {high: {steps: 5}, low: {steps: 6}}\ntrain: {steps: 12}",
        "train.steps: must be 11, the sum of per_expert.high.steps and per_expert.low.steps, got",
    ),
    (
        "per_expert: {high: {steps: 5}, low: {steps: 6}}\ntrain: {high_expert_share: equal}",
        "train.high_expert_share: has no effect, .* per_expert .* steps .*, got 'equal'",
    ),
    (
        "method: {kind: oft}\nper_expert: {high: {rank: 5}}",
        "per_expert.high.rank: has no effect, since method.kind oft has no ranks, got 5",
    ),
    ("method: {kind: fine_tune}\nper_expert: {low: {alpha: 5}}", "per_expert.low.alpha: has no"),
    (
        FOX + "method: {kind: embedding}\nper_expert: {low: {lr: 5}}",
        "per_expert.low.lr: has no effect, since method.kind embedding trains no expert, got 5.0",
    ),
    # Steps.
    (
        TI2V + "train: {steps: 10, warmup_steps: 4, cooldown_steps: 6}",
        r"train.cooldown_steps: and train.warmup_steps \(4\) together must be less than "
        r"train.steps \(10\), got 6; lower it$",
    ),
    (
        "train: {steps: 10, cooldown_steps: 5, switch_expert_every: 1}",
        "train.cooldown_steps: must be less than the 5 steps of the high expert, got 5; lower it",
    ),
    (
        "per_expert: {high: {steps: 50}, low: {steps: 6}}\ntrain: {warmup_steps: 6}",
        "train.warmup_steps: must be less than the 6 steps of the low expert, got 6; lower it",
    ),
    # Optimizers.
    (
        "optimizer: {name: adamw_schedule_free}\ntrain: {schedule: cosine}",
        "train.schedule.kind: must be constant, since optimizer.name adamw_schedule_free averages",
    ),
    (
        "optimizer: {name: prodigy_plus_schedule_free}\ntrain: {cooldown_steps: 5}",
        "train.cooldown_steps: must be 0, since optimizer.name prodigy_plus_schedule_free averages",
    ),
    (
        "optimizer: {name: sgd, nesterov: true}",
        "optimizer.nesterov: needs a momentum, and optimizer.momentum is 0",
    ),
    (
        "optimizer: {name: custom, class_path: os.path.join}",
        "optimizer.class_path: must be in one of torch.optim, .* got 'os.path.join'; a run file",
    ),
    (
        "optimizer: {name: custom, class_path: torch.optimal.SGD}",
        "optimizer.class_path: must be in one of",
    ),
    (
        "optimizer: {name: custom, class_path: torch.optim.SGD, arguments: {lr: 1}}",
        "optimizer.arguments: must not contain lr, got 1; use optimizer.lr",
    ),
    # Timesteps.
    (
        "train: {timesteps: {distribution: table, weights: [0, 0]}}",
        "train.timesteps.weights: must have a weight above 0, got",
    ),
    (  # the high expert serves t >= 0.875, which is u >= 0.368 before the shift of 12
        "train: {timesteps: {distribution: table, weights: [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]}}",
        "train.timesteps: with shift 12 the range of the high expert has no timesteps, 0.875 to 1",
    ),
    (
        "train: {timesteps: {distribution: table, weights: [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]}}",
        "train.timesteps: with shift 12 the range of the low expert has no timesteps, 0 to 0.875",
    ),
    (
        "train: {loss: {weighting: {kind: curve, points: [[0.5, 1], [0.5, 2]]}}}",
        r"train.loss.weighting.points: must have timesteps in ascending order, got \[0.5, 0.5\]",
    ),
    (
        "train: {loss: {weighting: {kind: curve, points: [[0, 0], [1, 0]]}}}",
        r"train.loss.weighting.points: must have a weight above 0, got \[\[0.0, 0.0\], \[1",
    ),
    (
        "train: {loss: {weighting: {kind: curve, points: [[0, 1], [0.8, 0], [1, 0]]}}}",
        r"train.loss.weighting: is 0 at all timesteps that the high expert draws \(0.875 to 1\)",
    ),
    # Timesteps of sources.
    (
        SOURCE % "timesteps: [800, 1000]",
        r"video_data.sources.0.timesteps: must be two noise levels from 0 \(clean\) to 1 "
        r"\(noise\), got \[800, 1000\]; if these are timesteps up to 1000, write \[0.8, 1\]",
    ),
    (
        SOURCE % "timesteps: [0.9, 0.5]",
        r"video_data.sources.0.timesteps: .* got \[0.9, 0.5\]; give the lower one first",
    ),
    (
        SOURCE % "timesteps: middle",
        r"video_data.sources.0.timesteps: must be high, low, or a list of two .* got 'middle'; ",
    ),
    (
        TI2V + SOURCE % "timesteps: low",
        r"video_data.sources.0.timesteps: ti2v-5b has one expert, got low; give a range: \[0.5, 1",
    ),
    (
        SOURCE % "timesteps: high" + "    - {path: more, timesteps: [0.9, 1]}",
        r"video_data.sources: has no clip for the low expert, which is trained at 0 to 0.875: "
        r"video_data.sources.0 has other timesteps, video_data.sources.1 has other timesteps; add "
        r"a source for it, or train the high expert alone: model.experts=high",
    ),
    (
        HIGH + SOURCE % "repeats: 2" + "    - {path: more, timesteps: low}",
        r"video_data.sources.1.timesteps: no timestep of 0 to 0.875 is trained; the range of the "
        r"trained expert is 0.875 to 1 \(high\); give another range, or take the source out",
    ),
    (
        SOURCE % "repeats: 2"
        + "    - {path: more, timesteps: [0.2, 0.3]}\n"
        + "train: {timesteps: {distribution: table, weights: [1, 0, 0, 0, 0, 0, 0, 1], shift: 1}}",
        r"video_data.sources.1.timesteps: with shift 1, train.timesteps draws nothing from 0.2 to "
        r"0.3, where the low expert trains them; give a wider range, or another",
    ),
    (
        SOURCE % "weighting: {kind: spline, points: [[0, 1], [0.8, 0], [1, 0]]}",
        r"video_data.sources.0.weighting: is 0 from 0.875 to 1, where the high expert trains them; "
        r"give it weight there",
    ),
    (
        SOURCE % "timesteps: [0, 0.2]"
        + "    - more\n"
        + "train: {loss: {weighting: {kind: curve, points: [[0.3, 0], [1, 1]]}}}",
        r"video_data.sources.0.timesteps: train.loss.weighting is 0 from 0 to 0.2, where the low ",
    ),
    (
        "validation: {sources: [{path: a, timesteps: low}]}",
        "validation.sources.0.timesteps: has no effect, since validation measures all clips alike",
    ),
    (
        "validation: {sources: [{path: a, weighting: min_snr}]}",
        "validation.sources.0.weighting: has no effect, since validation measures all clips alike",
    ),
    (
        "train: {first_frame_noise: [-3, 1]}",
        "train.first_frame_noise: has no effect, since only ti2v-5b",
    ),
    (
        TI2V + "train: {first_frame_noise: [-3, 1], condition_shares: {last: 1}}",
        "train.first_frame_noise: has no effect, since no sample is given its first frame",
    ),
    # Validation.
    (
        "validation: {sources: [{path: a}], share: 0.1}",
        "validation.share: holds out training clips, .* got 0.1; remove one of them",
    ),
    (
        "validation: {every: 5, clips: 0}",
        "validation.every: has no effect, since validation.clips is 0",
    ),
    (
        "train: {keep_best: true}\nvalidation: {every: 0}",
        "train.keep_best: .* validation.every is 0; give validation.ev",
    ),
]


@pytest.mark.parametrize(("text", "said"), BROKEN)
def test_a_broken_rule_gives_one_line_with_a_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert len(caught.value.problems) == 1, caught.value.problems
    found = caught.value.problems[0]
    assert re.match(said, found), found
    assert "; " in found
    assert "\n" not in found


@pytest.mark.parametrize(
    "text",
    [
        "method: {modules: [attention, all_linears, 'blocks.*.ffn.net.0', 'blocks.[01].attn?.*']}",
        "method: {kind: fine_tune, modules: [all, norms, biases, attention, proj_out.bias]}",
        "method: {init: pissa, use_rslora: true}",
        "method: {init_from: [a.safetensors, b.safetensors]}",
        "method: {init_from: [a.safetensors], rank: 4}\nper_expert: {low: {alpha: 2}}",
        "method: {kind: lokr, factor: 1}",
        "video_data: {sources: [{path: a, target: base}]}",
        "method: {kind: fine_tune}\nper_expert: {high: {lr: 1}}",
        "method: {kind: fine_tune, weights: float32}\noptimizer: {name: prodigy}",
        FLOAT32 + "method: {kind: fine_tune}\noptimizer: {name: prodigy}",
        "optimizer: {name: prodigy}",
        "method: {kind: fine_tune}\noutput: {formats: [comfyui, diffusers]}",
        FOX + "method: {kind: embedding}\noutput: {formats: [kohya]}",
        FOX + "method: {kind: embedding}\nper_expert: {high: {steps: 5}, low: {steps: 6}}",
        "embeddings: [{placeholder: 狐, name: fox}, {placeholder: <cat>}]",
        "per_expert: {high: {steps: 5}, low: {steps: 6}}\ntrain: {steps: 11, warmup_steps: 4}",
        HIGH + "per_expert: {high: {lr: 1, rank: 2}}",
        "train: {steps: 10, warmup_steps: 2, cooldown_steps: 2}",
        "optimizer: {name: adamw_schedule_free, warmup_steps: 5}",
        "optimizer: {name: sgd, nesterov: true, momentum: 0.9}",
        "optimizer: {name: custom, class_path: pytorch_optimizer.StableAdamW}",
        "train: {timesteps: {distribution: table, weights: [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]}}",
        HIGH + "train: {timesteps: {distribution: table, weights: [0, 1]}}",
        "train: {timesteps: {distribution: table, weights: [1, 1, 0, 0, 0], shift: 50}}",
        "train: {timesteps: {distribution: table, weights: [0, 0, 0, 1], shift_by_tokens: true}}",
        "train: {loss: {weighting: {kind: curve, points: [[0.1, 0], [0.9, 1]]}}}",
        "train: {loss: {weighting: {kind: curve, points: [[0.8, 0], [0.9, 1]]}}}",
        SOURCE % "timesteps: low" + "    - {path: more, timesteps: high}",
        SOURCE % "timesteps: [0.5, 0.875]" + "    - more",
        HIGH + SOURCE % "timesteps: high, weighting: none",
        TI2V + SOURCE % "timesteps: [0, 0.1], weighting: {kind: min_snr, gamma: 2}",
        # It is known only with the clips whether their own density reaches the range.
        SOURCE % "timesteps: [0.2, 0.3]"
        + "    - more\n"
        + "train: {timesteps: {distribution: table, weights: [1, 0, 0, 1], shift_by_tokens: true}}",
        TI2V + "train: {first_frame_noise: [-3, 1], condition_shares: {both: 1}}",
        "validation: {every: 5}\ntrain: {keep_best: true}",
        "validation: {clips: 0}",
    ],
)
def test_valid_combinations_are_accepted(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)


def test_the_examples_of_the_recipes_are_run_files(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    examples = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    two_looks, two_images = (load(tmp_path, example) for example in examples)
    assert [source.timesteps for source in two_looks.video_data.sources] == ["high", "low"]
    assert condition_shares(two_images).used == ("first", "both", "last", "none")
    # What is commented out needs two images.
    for name in ("front.png", "back.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (prompt,) = load(tmp_path, re.sub("^# ", "", examples[1], flags=re.MULTILINE)).sample.prompts
    assert prompt.image == tmp_path / "front.png" and prompt.last_image == tmp_path / "back.png"


def test_the_example_of_fun_control_is_a_run_file(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "variants.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert load(tmp_path, example).video_data.sources[0].condition == "random_frame"
    # What is commented out needs two files.
    for name in ("poses.mp4", "ohwx.png"):
        (tmp_path / name).touch()
    (prompt,) = load(tmp_path, re.sub("^#", " ", example, flags=re.MULTILINE)).sample.prompts
    assert prompt.control == tmp_path / "poses.mp4" and prompt.reference == tmp_path / "ohwx.png"
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"{I2V}sample: {{prompts: [{{prompt: a, image: ohwx.png, control: a}}]}}")
    assert any("control" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ("{first: 0.5}", "condition_shares: the shares must add up to 1, got 0.5"),
        ("{first: 0.7, both: 0.7}", "condition_shares: the shares must add up to 1, got 1.4"),
        ("{start: 1}", "train.condition_shares.start: "),
        ("{first: 1.5}", "train.condition_shares.first: "),
    ],
)
def test_shares_of_given_frames_are_whole(tmp_path: Path, shares: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"{I2V}train: {{condition_shares: {shares}}}")
    assert any(said in problem for problem in caught.value.problems), caught.value.problems


def test_a_condition_image_is_for_a_model_that_takes_one(tmp_path: Path) -> None:
    source = "video_data: {sources: [{path: clips, condition: random_frame}]}"
    load(tmp_path, I2V + source)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, TI2V + source)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "video_data.sources.0.condition: has no effect, since ti2v-5b takes no condition image"
    )


def test_the_table_of_settings_of_a_source_has_all_of_them() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    _, _, after = text.partition("## Settings of a source\n")
    rows = [line for line in after.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(SourceSection.model_fields)


def test_all_broken_rules_are_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            "method: {kind: fine_tune, fused_step: true}\n"
            "train: {accumulation: 2, keep_best: true}\n"
            "optimizer: {name: adamw_cpu_offload}\n"
            "embeddings: [{placeholder: a}, {placeholder: ab, train: false}]\n"
            "validation: {every: 5, clips: 0}\n",
        )
    assert [p.split(": ")[0] for p in caught.value.problems] == [
        "train.accumulation",
        "train.max_grad_norm",
        "method.weights",
        "method.fused_step",
        "embeddings.1.init_from",
        "embeddings.1.placeholder",
        "train.keep_best",
        "validation.every",
    ]


# --------------------------------------------------------------------------------------- resolution


def test_null_alphas_become_the_ranks(tmp_path: Path) -> None:
    layers = "per_module: [{modules: [ffn], rank: 4}, {modules: [attention], alpha: 3}]"
    text = f"method: {{rank: 8, {layers}}}\nper_expert: {{low: {{rank: 6}}, high: {{alpha: 1}}}}"
    config = load(tmp_path, text)
    assert config.method == LoraMethod(
        rank=8,
        alpha=8,
        per_module=(
            PerModule(modules=("ffn",), rank=4, alpha=4),
            PerModule(modules=("attention",), alpha=3),
        ),
    )
    assert (config.per_expert.low.alpha, config.per_expert.high.alpha) == (6, 1)
    loha = load(tmp_path, f"method: {{kind: loha, alpha: 2, {layers}}}").method
    assert isinstance(loha, LohaMethod)
    assert [layer.alpha for layer in loha.per_module] == [2, 3]
    started = load(tmp_path, "method: {init_from: [a.safetensors]}").method
    assert isinstance(started, LoraMethod)
    assert started.alpha is None  # the file's own


def test_names_steps_and_weight_precision_are_resolved(tmp_path: Path) -> None:
    text = (
        "method: {kind: embedding}\n"
        "embeddings: [{placeholder: <my-fox>}, {placeholder: b, name: c}]\n"
        "per_expert: {high: {steps: 5}, low: {steps: 6}}"
    )
    config = load(tmp_path, text)
    assert config.method == EmbeddingMethod()
    assert [e.name for e in config.embeddings] == ["my-fox", "c"]
    assert config.train.steps == 11
    tuned = load(tmp_path, FLOAT32 + "method: {kind: fine_tune}").method
    assert isinstance(tuned, FineTuneMethod)
    assert tuned.weights == "float32"
    kept = load(tmp_path, "method: {kind: fine_tune}").method
    assert isinstance(kept, FineTuneMethod)
    assert kept.weights == "stochastic"
