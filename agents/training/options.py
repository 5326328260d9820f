"""Options that both training commands have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ivt_agents.command import Hidden
from ivt_agents.play.on_split import MAX_UNUSABLE, play
from ivt_agents.training.folder import RunError, check_least
from ivt_agents.training.tracking import TrackerName, check_tracker
from ivt_agents.vlm.dry_run import Plan, dry_run
from ivt_agents.vlm.load import can_pack, check_weights, checkpoint_layers
from ivt_env.data.sample import DataError
from ivt_env.episodes import Episode
from ivt_env.rollouts import first_samples, make_vector_env

MAY_CHANGE = frozenset(
    {"save_steps", "max_unusable", "out", "report_to", "config", "resume", "overwrite"}
    | {"dry_run", "gpu_memory_gb", "image"}
)
"""Options that a resumed run may change: nothing that is learned depends on them."""

_LEAST = {"steps": 0, "save_steps": 1, "per_device_train_batch_size": 1, "lora_r": 0, "seed": 0, "eval_samples": 0}


@dataclass
class TrainingOptions:
    """Options that ``train_sft.py`` and ``train_grpo.py`` share."""

    config: Path | None = None
    """YAML file whose part `sft` or `grpo` gives defaults; flags override it."""
    env: str = "IVT-Scenes-v0"
    """Registered id to train in."""
    split: Hidden[str] = "train"
    """Split to train on."""
    data_root: str | None = None
    """Folder of real data sets."""
    resume: bool = False
    """Continue the interrupted run in `out`. Options that affect the result must not change."""
    overwrite: bool = False
    """Start over even if `out` already holds a run; the old run is deleted."""
    view: Literal["overlay", "closeup", "both"] | None = None
    """What a box is shown on: the whole image, the region around it enlarged, or both. None: the view that the model
    was trained with."""
    layout: Hidden[Literal["fresh", "prefix"] | None] = None
    """A prompt of its own each step, or one growing conversation (the paper). None: what the model was trained with."""
    learning_rate: float = 1e-3
    """The highest learning rate."""
    lora_r: int = 0
    """Rank of LoRA adapters on the language model; 0 trains its own weights."""
    lora_alpha: Hidden[int | None] = None
    """Adapters are scaled by lora_alpha / lora_r. None: 2 lora_r, or as in the adapter that is trained further."""
    max_unusable: Hidden[float] = MAX_UNUSABLE
    """Refuse to go on where more than this share of the first answers is unusable. 1: go on whatever they hold."""
    seed: int = 0
    """Decides the samples, their order, and what is sampled."""
    eval_samples: int = 300
    """Validation samples of each evaluation; 0: none at all."""
    eval_split: Hidden[str] = ""
    """Split of the evaluations. Empty: `val_search` of the scenes, where the first box is at chance, else `val`."""
    episode_steps: int = 8
    """Actions in an episode (the paper: one proposal and two refinements)."""
    bf16: bool = False
    """Compute in bfloat16, by autocast."""
    report_to: TrackerName = "tensorboard"
    """Where metrics go besides `metrics.jsonl`; wandb and trackio need the extra `trackers`."""
    dtype: Hidden[Literal["float32", "bfloat16"] | None] = None
    """Format of the weights. None: bfloat16 under nf4, else as a policy folder records it, or float32."""
    quantize: Literal["none", "nf4"] | None = None
    """nf4: load the language model's matrices in four bits; needs LoRA. None: as a policy folder records it."""
    attn_implementation: Hidden[Literal["eager", "sdpa", "flash_attention_2"] | None] = None
    """Attention code. None: sdpa. With flash_attention_2, turns no longer share a row in the update, because it takes
    no mask that could tell them apart."""
    gradient_checkpointing: Hidden[bool] = False
    """Keep each layer's input alone for the backward pass and compute the layer again there: less memory, about
    a third more time in the update. The result is the same."""
    dry_run: bool = False
    """Build the full architecture without weights, print the memory that it needs and what fits, and exit."""
    gpu_memory_gb: Hidden[float] = 80.0
    """Memory of the GPU that a dry run assumes."""
    image: Hidden[tuple[int, int]] = (480, 640)
    """Height and width of the images that a dry run assumes."""

    def __post_init__(self) -> None:
        """Choose the split of the evaluations."""
        self.eval_split = self.eval_split or ("val_search" if self.env == "IVT-Scenes-v0" else "val")

    def check(self, **least: int) -> None:
        """Refuse (``RunError``) what makes no sense by itself; ``least``: further lower bounds."""
        check_tracker(self.report_to)
        check_least(self, _LEAST | {"episode_steps": 1} | least)
        if not 0 < self.learning_rate < math.inf:
            raise RunError(f"learning_rate {self.learning_rate:g}: give a finite number greater than 0")
        if not 0 <= self.max_unusable <= 1:
            raise RunError(f"max_unusable {self.max_unusable:g}: give a fraction from 0 to 1")

    def check_model(self, lora_r: int) -> None:
        """Refuse what contradicts itself (RunError) or cannot be had here (PolicyError), before anything is loaded."""
        if self.lora_alpha is not None and (lora_r == 0 or self.lora_alpha < 1):
            raise RunError(
                f"lora_alpha {self.lora_alpha} with lora_r {lora_r}: no adapter would learn; give both at least 1"
            )
        low = self.quantize if self.quantize == "nf4" else self.dtype
        if lora_r == 0 and low in ("nf4", "bfloat16"):
            raise RunError(
                f"lora_r 0 with weights in {low}: every weight would be trained, and steps of AdamW smaller than"
                " 1/256 of a weight are lost in the rounding; give a --lora-r, or leave out --dtype and --quantize"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        usual = "bfloat16" if self.quantize == "nf4" else "float32"
        check_weights(self.dtype or usual, self.quantize or "none", self.attn_implementation, device)

    def loading(self) -> dict[str, Any]:
        """Those that ``load_policy`` takes."""
        held = {"dtype": self.dtype, "quantize": self.quantize, "attention": self.attn_implementation}
        return held | {"layout": self.layout, "view": self.view}

    def prepare_update(self, model: Any) -> None:
        """Switch on what changes the update alone; the model's adapters must be in place."""
        if self.gradient_checkpointing:
            checkpoint_layers(model)
        if not can_pack(model):
            print("attention flash_attention_2: packing is off, each turn is computed in a row of its own")

    def measured_on(self) -> range:
        """The samples of the evaluations, found before anything is loaded (``DataError``, with what helps)."""
        options: dict[str, Any] = {"data_root": self.data_root, "strict": True}
        make_vector_env(self.env, 1, split=self.split, **options).close()  # errors of the whole data set first
        if not self.eval_samples:
            return range(0)
        try:
            env = make_vector_env(self.env, 1, split=self.eval_split, **options)
        except DataError as error:
            raise DataError(
                f"eval_split {self.eval_split}: {error}. Name a split that is there with --eval-split ({self.split}"
                " is), or give --eval-samples 0 to train without evaluations"
            ) from error
        return first_samples(env.dataset, self.eval_samples)

    def measure(self, policy: Any, indices: range, **how: Any) -> list[Episode]:
        """Greedy episodes of ``policy`` for an evaluation."""
        played = {"max_steps": self.episode_steps, "data_root": self.data_root, "strict": True, **policy.shown}
        return play(policy, self.env, self.eval_split, indices, **played, **how)

    def print_dry_run(self, **own: Any) -> None:
        """What the command would need, and what fits; ``own`` is the command's part of the ``Plan``."""
        own |= {"lora_rank": self.lora_r, "autocast": self.bf16}
        print(dry_run(Plan(gpu_memory_gb=self.gpu_memory_gb, image=self.image, **own)))
