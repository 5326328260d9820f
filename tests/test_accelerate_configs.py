"""A launch configuration with a key that the launcher does not know, or a layer that the model does not
have, is found when eight GPUs have been waited for. accelerate's own classes read each of them here.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from ivt_agents.grpo.train import Args
from ivt_agents.vlm.load import load_policy

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "accelerate"
TYPES = {"ddp": DistributedType.MULTI_GPU, "fsdp": DistributedType.FSDP}


def launched_with(name: str, monkeypatch) -> dict[str, str]:
    """What the launcher would put into the environment of each process."""
    command = ["--config_file", str(FOLDER / f"{name}.yaml"), "--num_processes", "4", "train_grpo.py"]
    args = launch_command_parser().parse_args(command)
    args, _, _ = _validate_launch_command(args)
    env = prepare_multi_gpu_env(args)
    for key in list(os.environ):
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.delenv(key)
    for key, value in env.items():
        if key.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(key, value)
    return env


def test_all_that_are_shipped_are_tested():
    assert {p.stem for p in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_the_launcher_reads_it_and_knows_every_key(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.distributed_type == TYPES[name] and config.num_processes == 2
    assert Args().prompts % config.num_processes == 0, "the default command would be refused"


def test_fsdp_shards_the_layers_of_the_language_model_and_nothing_else(monkeypatch):
    env = launched_with("fsdp", monkeypatch)
    assert env["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False and plugin.activation_checkpointing is False
    (layer,) = plugin.transformer_cls_names_to_wrap
    model = load_policy("tiny").model
    sharded = [n for n, m in model.named_modules() if type(m).__name__ == layer]
    assert len(sharded) == model.config.text_config.num_hidden_layers
    assert all("visual" not in n for n in sharded)


def test_ddp_shares_nothing(monkeypatch):
    env = launched_with("ddp", monkeypatch)
    assert env.get("ACCELERATE_USE_FSDP", "false") == "false"


def test_a_launcher_that_starts_one_process_where_it_was_told_of_two_is_said_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    script = tmp_path / "one.py"
    script.write_text(
        "from ivt_agents.training.run import make_accelerator\n"
        "print('processes', make_accelerator('no').num_processes)\n"
    )
    for count, said in ((2, 1), (1, 0)):
        launch_command(launch_command_parser().parse_args(["--num_processes", str(count), str(script)]))
        output, errors = capfd.readouterr()
        assert output.strip() == "processes 1"
        assert [line.count("this is one process; torchrun") for line in errors.splitlines()].count(1) == said
