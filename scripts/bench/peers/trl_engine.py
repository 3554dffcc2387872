"""TRL's SFTTrainer with PEFT, as its own defaults run it, on records that are tokenized already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.meter import Meter
from peers.peft_engine import load_base, lora_config
from peers.task import Task


def train(task: Task, meter: Meter) -> dict[str, Any]:
    import datasets
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    meter.begin()
    records = [sample for step in task.steps for sample in step]
    data = datasets.Dataset.from_dict(
        {"input_ids": [sample.ids for sample in records], "labels": [sample.labels for sample in records]}
    )

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *arguments: Any, **options: Any) -> None:
            meter.ready()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
            if logs and "loss" in logs:
                meter.step(float(logs["loss"]))

    trainer = SFTTrainer(
        model=load_base(task),
        args=SFTConfig(
            output_dir=str(Path(task.folder) / "trl"),
            per_device_train_batch_size=task.settings.peer_batch,
            gradient_accumulation_steps=task.settings.samples_per_step // task.settings.peer_batch,
            max_steps=len(task.steps),
            max_length=task.settings.max_seq_len,
            learning_rate=task.settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="sequential",
            bf16=True,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=task.settings.seed,
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(task.weights, local_files_only=True),
        peft_config=lora_config(task),
        callbacks=[Told()],
    )
    trainer.train()
    meter.end()
    trainer.model.save_pretrained(Path(task.folder) / "adapter")
    return {"adapter": str(Path(task.folder) / "adapter")}
