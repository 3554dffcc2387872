"""What llama.cpp answers with edgepeft's GGUF files, beside what transformers answers with the merged folder.

    pip install llama-cpp-python            # compiles llama.cpp, some minutes
    python scripts/bench/llama_cpp_answers.py [--model smollm2-135m] [--adapter A] [--format gguf-f16]
        [--converters LLAMA_CPP_FOLDER] [--json FILE]

Without --adapter a random LoRA is made. Compared are, on the same prompts:
  - the tokens that both tokenizers make of a text;
  - the next-token distributions (mean KL in nats, and how often both find the same token the likeliest);
  - greedy answers, by the length of what they have in common.
Two ways lead to llama.cpp: the merged model as one GGUF file, and, where the base itself is a GGUF file, that file with
the exported LoRA beside it. With --converters, the files are also compared with those that llama.cpp's own
converters (they need the packages gguf and sentencepiece) make of the merged folder and of the exported PEFT adapter.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROMPTS = (
    "Name three rivers of Europe.",
    "What is 17 + 25?",
    "Write one sentence about the sea, in the year 1984.",
)


def edgepeft(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "edgepeft", *map(str, arguments), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr.strip() or f"edgepeft ended with code {done.returncode}")
    return json.loads(done.stdout)


def random_adapter(folder, shape, rank=8, size=0.02):
    """A LoRA on every linear, strong enough to change answers."""
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(shape.layers):
        for linear in shape.linears:
            prefix = f"base_model.model.model.layers.{layer}.{linear.name}"
            for side, form in (("A", (rank, linear.in_features)), ("B", (linear.out_features, rank))):
                tensors[f"{prefix}.lora_{side}.weight"] = (random.standard_normal(form) * size).astype(np.float32)
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    names = sorted({linear.name.rsplit(".", 1)[-1] for linear in shape.linears})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class LlamaCpp:
    def __init__(self, path, lora=None):
        import llama_cpp

        self._model = llama_cpp.Llama(
            str(path), lora_path=None if lora is None else str(lora), n_ctx=512, logits_all=True, verbose=False
        )

    def tokens(self, text):
        return self._model.tokenize(text.encode(), add_bos=False, special=True)

    def logits(self, ids):
        import numpy as np

        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[: len(ids)], dtype=np.float64)


class Transformers:
    def __init__(self, folder):
        import torch
        from transformers import AutoModelForCausalLM

        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def logits(self, ids):
        with self._torch.no_grad():
            return self._model(self._torch.tensor([ids])).logits[0].double().numpy()


def greedy(model, ids, count, stops):
    found = list(ids)
    for _ in range(count):
        token = int(model.logits(found)[-1].argmax())
        if token in stops:
            break
        found.append(token)
    return found[len(ids) :]


def compare(reference, other, prompts, tokens, stops):
    import numpy as np

    divergences, agreed, common, length = [], [], 0, 0
    for ids in prompts:
        p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (reference.logits(ids), other.logits(ids)))
        divergences += list((np.exp(p) * (p - q)).sum(-1))
        agreed += list(p.argmax(-1) == q.argmax(-1))
        ours, theirs = (greedy(model, ids, tokens, stops) for model in (reference, other))
        length += len(ours)
        common += next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
        )
    return {
        "mean_kl": float(np.mean(divergences)),
        "max_kl": float(np.max(divergences)),
        "top1_agreement": float(np.mean(agreed)),
        "same_answer_tokens": common,
        "answer_tokens": length,
    }


def convert(checkout, script, *arguments):
    """Runs one of llama.cpp's own converters."""
    done = subprocess.run(
        [sys.executable, str(checkout / script), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        sys.exit(f"{script} of {checkout} ended with code {done.returncode}: {''.join(last)}")


def compare_files(ours, theirs):
    """Two GGUF files: tensors that are the same in name, kind and bytes, others, and metadata that differs."""
    import numpy as np
    from gguf import GGUFReader

    readers = [GGUFReader(path) for path in (ours, theirs)]
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in readers]
    same = [
        name
        for name in tensors[0].keys() & tensors[1].keys()
        if tensors[0][name].tensor_type == tensors[1][name].tensor_type
        and np.array_equal(tensors[0][name].data, tensors[1][name].data)
    ]
    words = [{key: reader.get_field(key).contents() for key in reader.fields} for reader in readers]
    return {
        "same_tensors": len(same),
        "other_tensors": sorted((tensors[0].keys() | tensors[1].keys()) - set(same)),
        "other_metadata": sorted(
            key for key in words[0].keys() | words[1].keys() if words[0].get(key) != words[1].get(key)
        ),
    }


def ask_llama_cpp(entry, work, tokens):
    import llama_cpp

    from edgepeft.data.template import ChatTemplate
    from edgepeft.data.tokens import Tokenizer

    folder = work / "merged"
    tokenizer, template = Tokenizer.load(folder), ChatTemplate.load(folder)
    texts = [template.render([{"role": "user", "content": text}], add_generation_prompt=True) for text in PROMPTS]
    prompts, stops = [tokenizer.encode(text) for text in texts], set(tokenizer.stop_token_ids(template))
    reference, merged = Transformers(folder), LlamaCpp(work / "merged.gguf")
    results = {
        "llama_cpp_python": llama_cpp.__version__,
        "same_tokens": [merged.tokens(text) for text in texts] == prompts,
        "merged": compare(reference, merged, prompts, tokens, stops),
    }
    if entry.kind in ("gguf", "embedded"):
        beside = LlamaCpp(entry.source, work / "lora.gguf")
        results["lora_beside_base"] = compare(reference, beside, prompts, tokens, stops)
    return results


def report(results):
    if "same_tokens" in results:
        print(f"  tokens of {len(PROMPTS)} prompts: {'the same' if results['same_tokens'] else 'DIFFERENT'}")
    for key in ("merged", "lora_beside_base"):
        if key in results:
            found = results[key]
            print(
                f"  {key}: KL {found['mean_kl']:.2g} nats a token (at most {found['max_kl']:.2g}), "
                f"same likeliest token {found['top1_agreement']:.1%}, "
                f"greedy answers alike for {found['same_answer_tokens']} of {found['answer_tokens']} tokens"
            )
    for key in ("model_file", "adapter_file"):
        if key in results:
            found = results[key]
            print(
                f"  {key} beside llama.cpp's converter: {found['same_tensors']} tensors the same, others: "
                f"{', '.join(found['other_tensors']) or 'none'}; metadata that differs: "
                f"{', '.join(found['other_metadata']) or 'none'}"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--adapter", help="NAME, NAME@v2 or a folder; random when left out")
    parser.add_argument("--format", default="gguf-f16", choices=["gguf-f16", "gguf-q8_0"])
    parser.add_argument("--tokens", type=int, default=24, help="of a greedy answer")
    parser.add_argument("--converters", metavar="DIR", type=Path, help="sources of llama.cpp, with its converters")
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    asked = importlib.util.find_spec("llama_cpp") is not None
    if not asked:
        missing = (
            "llama-cpp-python is not installed, so llama.cpp was not asked. Install it with: "
            "pip install llama-cpp-python (it compiles llama.cpp: a C++ compiler and some minutes are needed)"
        )
        if options.converters is None:
            sys.exit(missing)
        print(missing)
    from edgepeft.models.store import ensure_model

    entry = ensure_model(options.model)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        adapter = options.adapter or random_adapter(work / "random", entry.shape)
        base = ("--base", entry.name)
        # The GGUF file's own rounding is what is looked at here, not the limit.
        edgepeft("adapters", "merge", adapter, *base, "--out", work / "merged", "--dtype", "fp32", "--force")
        file = edgepeft(
            "adapters", "merge", adapter, *base, "--out", work / "merged.gguf", "--format", options.format, "--force"
        )
        edgepeft("adapters", "export", adapter, *base, "--out", work / "lora.gguf", "--format", "gguf")
        results = {"model": entry.name, "format": options.format, "edgepeft_drift": file["drift"]}
        if asked:
            results |= ask_llama_cpp(entry, work, options.tokens)
        if options.converters is not None:
            form = options.format.removeprefix("gguf-")
            convert(
                options.converters,
                "convert_hf_to_gguf.py",
                work / "merged",
                "--outfile",
                work / "theirs.gguf",
                "--outtype",
                form,
            )
            results["model_file"] = compare_files(work / "merged.gguf", work / "theirs.gguf")
            edgepeft("adapters", "export", adapter, *base, "--out", work / "plain", "--format", "peft")
            convert(
                options.converters,
                "convert_lora_to_gguf.py",
                "--base",
                entry.folder,
                work / "plain",
                "--outfile",
                work / "their-lora.gguf",
            )
            results["adapter_file"] = compare_files(work / "lora.gguf", work / "their-lora.gguf")
    print(f"{options.format} of {entry.name}")
    report(results)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
