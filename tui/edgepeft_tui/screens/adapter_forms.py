"""The forms of the Adapters screen. Each checks what can be told at once; the rest is told by the work itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edgepeft.errors import BadInput, UsageError
from edgepeft.paths import as_name, check_name
from edgepeft_tui.adapter_work import number, whole
from edgepeft_tui.screens.form import Field, Form, Values

_CUT = ("svd", "ties", "dare")
_YES_NO = (("no", ""), ("yes", ""))


def compose_form(references: Sequence[str], before: Mapping[str, str]) -> Form:
    """Adds adapters up; `before` has what the form held when it was last taken."""
    share = f"{1 / len(references):.2g}"
    fields = [
        Field("name", "name", before.get("name", _joined(references)), hint="name of the new adapter"),
        *(
            Field(f"weight-{at}", f"weight of {reference}", before.get(f"weight-{at}", share), hint="1")
            for at, reference in enumerate(references)
        ),
        Field(
            "how",
            "how",
            before.get("how", "exact"),
            (
                ("exact", "ranks side by side: the sum itself"),
                ("svd", "the sum, cut to a rank"),
                ("ties", "largest entries by sign, cut to a rank"),
                ("dare", "random entries rescaled, cut to a rank"),
                ("linear", "factors added, as PEFT does; not the sum"),
            ),
        ),
        Field("rank", "rank", before.get("rank", ""), hint="largest of the parts", only=("how", _CUT)),
        Field("density", "density", before.get("density", ""), hint="ties 0.2, dare 0.5", only=("how", _CUT[1:])),
        Field("seed", "seed", before.get("seed", ""), hint="0", only=("how", ("dare",))),
    ]

    def check(values: Values) -> None:
        check_name(values["name"], where="name")
        for at, reference in enumerate(references):
            number(values[f"weight-{at}"], f"weight of {reference}")
        whole(values.get("rank", ""), "rank")
        number(values.get("density", ""), "density")
        whole(values.get("seed", ""), "seed")

    return Form(fields, title="Compose", question="One adapter from several, without training.", check=check)


def average_form(references: Sequence[str], before: Mapping[str, str]) -> Form:
    """Averages adapters that were trained in different places."""
    fields = [
        Field("name", "name", before.get("name", _joined(references)), hint="name of the new adapter"),
        Field(
            "by",
            "weighed by",
            before.get("by", "samples"),
            (("samples", "each one's share of all training samples"), ("equal", "all alike")),
        ),
        *(
            Field(
                f"samples-{at}",
                f"samples of {reference}",
                before.get(f"samples-{at}", ""),
                hint="as its card says",
                only=("by", ("samples",)),
            )
            for at, reference in enumerate(references)
        ),
        Field(
            "what",
            "averaged",
            before.get("what", "updates"),
            (("updates", "exact, with all ranks, or cut"), ("factors", "A and B one by one; not the mean")),
        ),
        Field("rank", "cut to rank", before.get("rank", ""), hint="not cut", only=("what", ("updates",))),
    ]

    def check(values: Values) -> None:
        check_name(values["name"], where="name")
        whole(values.get("rank", ""), "rank")
        for at, reference in enumerate(references):
            whole(values.get(f"samples-{at}", ""), f"samples of {reference}")

    return Form(fields, title="Average", question="The mean of several adapters (federated averaging).", check=check)


def merge_form(reference: str, before: Mapping[str, str]) -> Form:
    """Writes a model that has the adapter in its weights."""
    fields = [
        Field("out", "to", before.get("out", ""), hint="a new folder, or NAME.gguf"),
        Field(
            "format",
            "format",
            before.get("format", "safetensors"),
            (
                ("safetensors", "a model folder"),
                ("gguf-f16", "a .gguf file, 16 bit"),
                ("gguf-q8_0", "a .gguf file, 8 bit"),
            ),
        ),
        Field(
            "into",
            "into",
            before.get("into", "auto"),
            (
                ("auto", "what fits the training"),
                ("original", "the weights in the base's files"),
                ("dequantized", "the values that training computed with"),
            ),
        ),
        Field(
            "dtype",
            "dtype",
            before.get("dtype", "auto"),
            (("auto", "the base's, or training's"), ("bf16", ""), ("fp16", ""), ("fp32", "")),
            only=("format", ("safetensors",)),
        ),
        Field("limit", "limit, nats a token", before.get("limit", ""), hint="0.02"),
        Field("force", "keep beyond it", before.get("force", "no"), (("no", ""), ("yes", "and replace what is there"))),
    ]

    def check(values: Values) -> None:
        _check_out(values["out"], values["format"] != "safetensors")
        limit = number(values["limit"], "limit")
        if limit is not None and limit < 0:
            raise UsageError("a limit below 0 is not possible", where="limit", hint="Leave it empty for 0.02")

    question = f"A model with {reference} in its weights; compared with the adapter on its base before it is kept."
    return Form(fields, title="Merge", question=question, check=check)


def export_form(reference: str, before: Mapping[str, str]) -> Form:
    """Writes the adapter alone, for other programs."""
    fields = [
        Field("out", "to", before.get("out", ""), hint="a new folder, or NAME.gguf"),
        Field(
            "format",
            "format",
            before.get("format", "peft"),
            (("peft", "a folder for PEFT and vLLM"), ("gguf", "a .gguf file for llama.cpp")),
        ),
        Field("force", "replace what is there", before.get("force", "no"), _YES_NO),
    ]
    question = f"{reference} alone, as other programs read it."
    return Form(
        fields,
        title="Export",
        question=question,
        check=lambda values: _check_out(values["out"], values["format"] == "gguf"),
    )


def import_form(before: Mapping[str, str]) -> Form:
    """Copies a folder or a file into the library."""
    fields = [
        Field("path", "folder or file", before.get("path", ""), hint="of PEFT, edgepeft or mlx-lm, or a LoRA file"),
        Field("name", "name", before.get("name", ""), hint="as the folder or file is called"),
        Field("base", "base", before.get("base", ""), hint="a model of the store: needed for a file"),
        Field("alpha", "alpha", before.get("alpha", ""), hint="of a LoRA file that does not say it"),
    ]

    def check(values: Values) -> None:
        path = Path(values["path"]).expanduser()
        if not values["path"] or not path.exists():
            raise BadInput("there is no such folder or file", where=values["path"] or "path", hint="Name another")
        number(values["alpha"], "alpha")
        values["name"] = check_name(values["name"] or as_name(path.stem if path.is_file() else path.name), where="name")

    return Form(fields, title="Import", question="A copy goes into the library.", take="Import", check=check)


def _check_out(text: str, file: bool) -> None:
    out = Path(text).expanduser()
    if not text:
        raise UsageError("nothing is named", where="to", hint="Name a new folder, or NAME.gguf")
    if file and out.suffix != ".gguf":
        raise UsageError(f"{text} is no name of a GGUF file", where="to", hint=f"Use for example {text}.gguf")
    if not file and out.suffix == ".gguf":
        raise UsageError(f"{text} is named like a GGUF file", where="to", hint="Choose a GGUF format, or name a folder")
    if not out.absolute().parent.is_dir():
        raise BadInput("there is no such folder", where=str(out.parent), hint="Make it first, or name another")


def _joined(references: Sequence[str]) -> str:
    return as_name("-".join(reference.partition("@")[0] for reference in references))
