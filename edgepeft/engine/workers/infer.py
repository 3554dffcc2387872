"""`python -m edgepeft.engine.workers.infer`: requests on stdin, replies on stdout, as chat/protocol.py says."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from typing import BinaryIO

import msgspec

from edgepeft.chat.protocol import Loading, Ready, Reply, Trouble
from edgepeft.errors import EdgepeftError, ExitCode, OutOfMemory


def main(arguments: list[str] | None = None) -> int:
    """Loads the base, says `Ready`, and answers until `Quit` or the end of stdin; returns the exit code."""
    parser = argparse.ArgumentParser(prog="infer")
    parser.add_argument("--model", required=True, help="name in the model store")
    parser.add_argument("--precision", required=True, choices=["fp32", "bf16", "fp16", "int8", "nf4"])
    parser.add_argument("--compute", required=True, choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="cpu", help="cpu, or the UUID of the one visible card")
    parser.add_argument("--budget", type=int, help="bytes for the base, the adapters and the key-value cache")
    options = parser.parse_args(arguments)
    # Libraries print to stdout as they like; only the protocol may reach the reader.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        load_and_serve(sys.stdin.buffer, replies, options)
    except EdgepeftError as error:
        _send(replies, Trouble(id=0, message=str(error), exit_code=error.exit_code))
        return error.exit_code
    except BrokenPipeError:
        # The front end is gone, and nobody is left to answer.
        return ExitCode.DONE
    except Exception as error:  # noqa: BLE001 - the last line of defence: the front end must hear of a bug of ours
        traceback.print_exc()
        what = f"internal error in the inference process: {type(error).__name__}: {error}"
        _send(replies, Trouble(id=0, message=what, exit_code=ExitCode.BUG))
        sys.stderr.flush()
        # The thread that reads stdin would abort an orderly exit.
        os._exit(ExitCode.BUG)
    return ExitCode.DONE


def load_and_serve(requests: BinaryIO, replies: BinaryIO, options: argparse.Namespace) -> None:
    """Loads the base and answers requests; raises what keeps the base from loading."""
    _send(replies, Loading(id=0, what="starting"))
    begun = time.perf_counter()
    import torch

    from edgepeft.engine.inference.requests import Wire, serve
    from edgepeft.engine.inference.session import Session
    from edgepeft.engine.model.load import load_model
    from edgepeft.engine.training.device import training_device
    from edgepeft.engine.training.recovery import is_out_of_memory
    from edgepeft.models.store import find_model

    warnings: list[str] = []
    device = training_device(options.device, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        loaded = load_model(
            find_model(options.model),
            precision=options.precision,
            compute_dtype=options.compute,
            device=device,
            dense_values=device.type == "cpu",
            progress=lambda what, fraction: _send(replies, Loading(id=0, what=what, fraction=fraction)),
            warn=warnings.append,
        )
        session = Session(loaded, options.budget)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        hint = "Free some memory, or use --precision nf4 or a smaller model"
        raise OutOfMemory("memory ran out while loading", where=options.model, hint=hint) from error
    ready = Ready(
        id=0,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        precision=options.precision,
        live_bytes=session.live_bytes,
        load_seconds=time.perf_counter() - begun,
        warnings=tuple(warnings),
    )
    _send(replies, ready)
    serve(Wire(requests, replies), session)


def _send(replies: BinaryIO, reply: Reply) -> None:
    replies.write(msgspec.json.encode(reply) + b"\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main())
