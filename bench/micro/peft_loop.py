"""The local step that the suite's is timed against: transformers' classifier with PEFT's LoRA.

It is as one would write it in a script. Of the suite it has only where models come from.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.config.sections import ModelConfig
from bench.models.source import DRAWN, load_config, loading
from fedara_core.errors import InputError
from fedara_core.method import Batch


def require_peft() -> None:
    """Raises InputError where PEFT is not installed: the suite itself does without."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError(
            "peft is not installed, and its loop is what a step is compared with; allowed: "
            "pip install -c constraints.txt peft"
        ) from None


def build_peft_model(config: ModelConfig, *, num_classes: int, lora_rank: int) -> Any:
    """transformers' classifier in training mode, with its default attention and LoRA of scale 1 on
    all linear layers but the head, which trains whole. Raises InputError for a model that is not
    there."""
    import peft
    import transformers

    auto = transformers.AutoModelForSequenceClassification
    settings = load_config(config)
    settings.num_labels = num_classes
    text_settings = settings.get_text_config()
    if getattr(text_settings, "pad_token_id", None) is None:  # decoders refuse batches without one
        text_settings.pad_token_id = 0
    if config.name in DRAWN:
        model = auto.from_config(settings)  # type: ignore[no-untyped-call]
    else:
        with loading(config.name) as source:
            model = auto.from_pretrained(source, config=settings, dtype=torch.float32)
    body = model.base_model_prefix
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    lora = peft.LoraConfig(
        r=lora_rank,
        lora_alpha=lora_rank,
        target_modules=[
            name
            for name, layer in model.named_modules()
            if isinstance(layer, linear) and name.startswith(f"{body}.")
        ],
        modules_to_save=[
            name
            for name, part in model.named_children()
            if name != body and any(True for _ in part.parameters())
        ],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT settles by itself
        return peft.get_peft_model(model, lora).train()


def peft_step(model: nn.Module, *, lr: float, precision: str) -> Callable[[Batch], Tensor]:
    """A call that trains a model of `build_peft_model` on one batch and returns its loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)

    def step(batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        loss = functional.cross_entropy(output.logits.float(), batch["labels"])
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
