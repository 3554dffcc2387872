"""PEFT in a bare loop: micro-batches of like lengths, padded to their longest, checkpointing, no metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.meter import Meter
from peers.task import Sample, Task


def load_base(task: Task) -> Any:
    """The base as transformers loads it, its linears in NF4 with double quantization or in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = None
    if task.precision == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        task.weights, dtype=torch.bfloat16, quantization_config=quantization, local_files_only=True
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else a forward in eval mode repacks the weights in place and nothing can be trained afterwards.
            module.support_avx512bf16_for_cpu = False
    return model


def lora_config(task: Task) -> Any:
    """Rank, scale and targets of the task."""
    from peft import LoraConfig

    return LoraConfig(
        r=task.settings.rank,
        lora_alpha=2 * task.settings.rank,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )


def padded(samples: list[Sample]) -> dict[str, Any]:
    """One micro-batch, padded on the right to its longest sample."""
    import torch

    longest = max(len(sample.ids) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), -100)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        ids[row, :length] = torch.tensor(sample.ids)
        labels[row, :length] = torch.tensor(sample.labels)
        mask[row, :length] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def train(task: Task, meter: Meter) -> dict[str, Any]:
    import torch
    from peft import get_peft_model

    meter.begin()
    torch.manual_seed(task.settings.seed)
    model = get_peft_model(load_base(task), lora_config(task))
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=task.settings.learning_rate, weight_decay=0.0, fused=True)
    meter.ready()
    for step in task.steps:
        ordered = sorted(step, key=lambda sample: len(sample.ids))
        count = sum(sum(sample.trained) for sample in step)
        total = 0.0
        for begin in range(0, len(ordered), task.settings.peer_batch):
            batch = padded(ordered[begin : begin + task.settings.peer_batch])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(**batch, num_items_in_batch=count).loss
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.step(total)
    meter.end()
    model.save_pretrained(Path(task.folder) / "adapter")
    return {"adapter": str(Path(task.folder) / "adapter")}
