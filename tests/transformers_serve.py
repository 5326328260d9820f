"""transformers' own server with one model, as ``transformers serve FOLDER --port PORT`` starts it.

    python tests/transformers_serve.py FOLDER PORT

Its processors want torchvision, for videos alone. No build of it fits every torch, so that the processor is put
together without its video part; everything else is the server's own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLProcessor
from transformers.cli.serve import Serve
from transformers.cli.serving.model_manager import ModelManager


class ImagesOnly(Qwen3VLProcessor):
    """Qwen's processor without a video part."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def load_processor(self: ModelManager, model: str, gguf_file: str | None = None) -> ImagesOnly:
    folder = model.split("@", 1)[0]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return ImagesOnly(images, tokenizer, None, chat_template=tokenizer.chat_template)


if __name__ == "__main__":
    torch.set_num_threads(1)
    ModelManager._load_processor = load_processor
    Serve(
        sys.argv[1], device="cpu", dtype="float32", attn_implementation="eager", port=int(sys.argv[2]), host="127.0.0.1"
    )
