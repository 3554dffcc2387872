"""`edgepeft chat`: talk to a base model with any of its adapters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepeft.cli.output import JsonFlag

if TYPE_CHECKING:
    from edgepeft.chat.client import SyncInference
    from edgepeft.chat.protocol import Sampling
    from edgepeft.chat.setup import Prompting, Setup


def chat(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Base model: a name, a folder or a GGUF file; the adapter's base when left out.", show_default=False
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="NAME, NAME@v2 or a folder; =0.7 sets its strength.", show_default=False),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this and end; - reads stdin.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.", show_default=False)] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Chat template: chatml, plain or a Jinja file.", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="0 takes the likeliest token; as the model advises.", show_default=False),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Smallest set of tokens with this probability.", show_default=False)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", help="This many likeliest tokens; 0 means all.", show_default=False)
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option("--min-p", help="Leave out tokens below this share of the likeliest.", show_default=False),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", help="Above 1 discourages repetition.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="The same seed draws the same answer.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Longest answer in tokens.")] = 512,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision", help="How the base is held: bf16, fp16, fp32, int8 or nf4; as trained.", show_default=False
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Card by UUID or index, or cpu.", show_default=False)] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Memory for the base, its adapters and the conversation, such as 6GiB.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Chat with a base model and its adapters; /help lists the commands."""
    import msgspec

    from edgepeft.chat.protocol import Sampling, check_sampling
    from edgepeft.chat.sampling_defaults import sampling_defaults
    from edgepeft.chat.setup import choose_prompting, choose_setup, parse_adapter
    from edgepeft.cli.output import interactive, note
    from edgepeft.cli.worker_progress import loading_status, start_inference
    from edgepeft.errors import UsageError
    from edgepeft.units import parse_bytes

    given: dict[str, Any] = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    budget_bytes = None if budget is None else parse_bytes(budget, where="--budget")
    typed = {name: value for name, value in given.items() if value is not None}
    check_sampling(Sampling(**typed))
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        prompt = _read_stdin()
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty", where="--prompt", hint="Write a question")
    if as_json and prompt is None:
        raise UsageError("--json needs a prompt", where="--json", hint="Add --prompt TEXT")
    with loading_status() as progress:
        setup = choose_setup(model, [parse_adapter(text) for text in adapter or []], precision, gpu, progress)
        prompting = choose_prompting(setup.entry, setup.adapters, template, fall_back=True)
    sampling = msgspec.structs.replace(sampling_defaults(Path(setup.entry.folder)), **typed)
    for warning in (*setup.warnings, *prompting.warnings):
        note(f"Warning: {warning}", "yellow")
    with start_inference(setup, budget_bytes) as inference:
        if prompt is not None:
            _answer_once(inference, setup, prompting, prompt, system, sampling, as_json)
        else:
            from edgepeft.cli.chat_loop import ChatLoop

            ChatLoop(inference, setup, prompting, sampling, system, template, styled=interactive()).run()


def _answer_once(
    inference: SyncInference,
    setup: Setup,
    prompting: Prompting,
    prompt: str,
    system: str | None,
    sampling: Sampling,
    as_json: bool,
) -> None:
    """One answer: only its text on stdout, or one JSON object."""
    from edgepeft.chat.conversation import Conversation
    from edgepeft.chat.setup import encode_conversation
    from edgepeft.cli.answers import stream_answer
    from edgepeft.cli.output import note, print_json
    from edgepeft.errors import Interrupted

    conversation = Conversation(prompting.system if system is None else system)
    conversation.ask(prompt)
    ids = encode_conversation(conversation.messages(), prompting)
    stream = inference.generate(ids, prompting.stop_ids, sampling, [chosen.use for chosen in setup.adapters])
    text, answer = stream_answer(stream, prompting.tokenizer, quiet=as_json)
    if as_json:
        print_json(
            {
                "answer": text,
                "model": setup.entry.name,
                "adapters": [chosen.label for chosen in setup.adapters],
                "precision": setup.precision,
                "stopped_by": answer.stopped_by,
                "prompt_tokens": answer.prompt_tokens,
                "answer_tokens": len(answer.ids),
                "prefill_seconds": answer.prefill_seconds,
                "tokens_per_second": answer.tokens_per_second,
                "warnings": [*setup.warnings, *prompting.warnings],
            }
        )
    if answer.stopped_by == "cancelled":
        raise Interrupted("the answer was stopped")
    if answer.stopped_by == "length":
        note(f"The answer was cut at {sampling.max_new_tokens} tokens (--max-new-tokens).")
    if answer.stopped_by == "context":
        note(f"The answer was cut: the model's context of {setup.entry.shape.context_length:,} tokens is full.")


def _read_stdin() -> str:
    from edgepeft.errors import BadInput

    try:
        return sys.stdin.buffer.read().decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise BadInput(f"is not UTF-8: {error}", where="stdin", hint="Convert it to UTF-8 first") from error
