"""Not a test: run under ``accelerate launch`` by test_grpo.py. Writes the gradient of fixed rows.

accelerate launch --cpu --num_processes N tests/ddp_gradients.py OUT
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from learner import small_trainer

from agents.grpo.collect import collect


def main(out: Path) -> None:
    trainer = small_trainer(out.parent / f"run-{torch.initial_seed()}", prompts=2, group=4, micro_batch=3)
    world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
    # All rows are made by every process in the same way, and shared out afterwards.
    from ivt_env.rollouts import make_vector_env

    env = make_vector_env("IVT-Scenes-v0", 8, split="train")
    trainer.policy.generator.manual_seed(5)
    groups = collect(env, trainer.policy, [3, 4], 4)
    rows = [t for episode in groups.turns for t in episode]
    advantages = [((7 * i) % 5 - 2) / 2 for i in range(len(rows))]
    tokens = float(sum(len(t.completion) for t in rows))
    kept: dict[str, torch.Tensor] = {}

    def keep_gradients(*_: object, **__: object) -> None:
        named = trainer.policy.model.named_parameters()
        kept.update({n: p.grad.clone() for n, p in named if p.requires_grad})

    trainer.optimizer.step = keep_gradients
    metrics = trainer._update(rows[rank::world], advantages[rank::world], rows[0], tokens, True)
    if trainer.accelerator.is_main_process:
        torch.save({"gradients": kept, "metrics": metrics}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
