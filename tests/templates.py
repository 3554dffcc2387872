"""Chat templates of the common kinds, and a trained subword tokenizer with the control tokens they need."""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "templates"
CONTROL = {
    "smollm2": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    "qwen25": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
    "gemma": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
    "mistral": (
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    "marked": ("<|endoftext|>", "<|im_end|>", "<|im_start|>"),
}
"""Template → its control tokens: the beginning of text, eos_token, and the others."""
KINDS = tuple(CONTROL)
_TEXTS = (
    "What is the capital of France? The capital of France is Paris, a city of two million people on the Seine.",
    "system user assistant model tool Please answer in one sentence. Thank you! That is all I wanted to know.",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "unit": "celsius"}} {"temperature": 21}',
    "Das Wetter in Zürich ist schön: 21 °C, wie gestern. 東京の天気は晴れです。 🎉🎉",
    "You are a helpful assistant. Today Date: 26 Jul 2024\n\nEnvironment: ipython\n",
)


def write_model_folder(folder: Path, kind: str) -> Path:
    """tokenizer.json (byte-level BPE with merges), tokenizer_config.json, generation_config.json and the template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False, min_frequency=1
    )
    backend.train_from_iterator(_TEXTS * 3, trainer)
    control = CONTROL[kind]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": control[0], "eos_token": control[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(
        (FOLDER / f"{kind}.jinja").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": backend.token_to_id(control[1])}))
    return folder
