"""Answers to a few fixed prompts while a run trains, so that a person sees what it learns.

They are made by the code that chats, on the model that trains: with an attention that reads a cache, and without
anything left behind that the next step could notice. Whatever goes wrong here costs a sample, never the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from edgepeft.chat.protocol import Sampling
from edgepeft.data.conversation import RecordError
from edgepeft.data.encode import encode_prompt
from edgepeft.data.prepare import load_template
from edgepeft.data.template import ChatTemplate
from edgepeft.data.tokens import Tokenizer
from edgepeft.engine.heap import trim_heap
from edgepeft.engine.inference.generate import generate
from edgepeft.engine.inference.session import Session
from edgepeft.engine.ledger import counting_as
from edgepeft.engine.model.load import LoadedModel
from edgepeft.engine.training.attention import use_packed_attention
from edgepeft.engine.training.memory import MemoryGauge
from edgepeft.engine.training.opening import Emit
from edgepeft.engine.training.recovery import first_line, is_out_of_memory, release_memory
from edgepeft.errors import BadInput, EdgepeftError
from edgepeft.runs.events import PhaseChanged, SampleGenerated, Warned
from edgepeft.spec import DataRef

_GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=64, seed=0)


class Samples:
    """The prompts of one run.

    Args:
        loaded: the model, not yet switched to packed attention.
        data: says how a prompt is written.
        prompts: as the plan has them.
        gauge: keeps the run's memory limit.
        poll: called between two tokens; it may raise to leave.
        emit: told the answers.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        data: DataRef,
        prompts: Sequence[str],
        gauge: MemoryGauge,
        poll: Callable[[], None],
        emit: Emit,
    ) -> None:
        self._loaded = loaded
        self._data = data
        self._left = list(prompts)
        """A prompt that could not be answered once is not tried again."""
        self._gauge = gauge
        self._watched_tokens = 0
        """Of the longest prompt with its answer that was followed and did not break the limit."""
        self._poll = poll
        self._emit = emit
        config: Any = loaded.model.config
        self._attention: str = config._attn_implementation

    def answer(self, step: int) -> None:
        """Answers every prompt with what is active now, the likeliest token each time.

        Args:
            step: optimizer steps done, for the events.
        """
        if not self._left:
            return
        self._emit(PhaseChanged(name="evaluate", detail="answering the sample prompts"))
        with self._cached_attention():
            for prompt in list(self._left):
                why = ""
                try:
                    self._emit(SampleGenerated(step=step, prompt=prompt, answer=self._answer(prompt)))
                except EdgepeftError as error:
                    why = error.what
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    why = first_line(error)
                if why:
                    # What the failed attempt held is free only now that its error is gone.
                    release_memory()
                    self._left.remove(prompt)
                    self._emit(Warned(message=f"the sample prompt {prompt!r} is left out: {why}", step=step))

    def _answer(self, prompt: str) -> str:
        folder = Path(self._loaded.entry.folder)
        # As at a run's end: the tokenizer finds room where the last step's tensors were.
        trim_heap()
        tokenizer = Tokenizer.load(folder)
        template = load_template(self._data, folder)
        ids = _encode(prompt, self._data.system, tokenizer, template)

        def cancelled() -> bool:
            self._poll()
            return False

        # To follow every tensor takes several times as long as to make the answer: done once for each length.
        wanted = len(ids) + _GREEDY.max_new_tokens > self._watched_tokens
        watched: AbstractContextManager[object] = self._gauge.watch() if wanted else nullcontext()
        with watched, counting_as("KV cache", "answer to a sample prompt"):
            made = generate(
                Session(self._loaded), ids, tokenizer.stop_token_ids(template), _GREEDY, cancelled=cancelled
            )
        self._watched_tokens = max(self._watched_tokens, len(ids) + len(made.ids))
        return tokenizer.decode(made.ids, skip_special_tokens=True).strip()

    @contextmanager
    def _cached_attention(self) -> Iterator[None]:
        """Within it, the model attends as it did when it was loaded: packed rows know no cache."""
        model: Any = self._loaded.model
        model.set_attn_implementation(self._attention)
        try:
            yield
        finally:
            use_packed_attention(model)


def _encode(prompt: str, system: str | None, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """The ids that the model goes on from: a user's message, or in plain text its beginning."""
    if template is None:
        ids = tokenizer.encode(prompt, add_special_tokens=True)
        return ids[:-1] if ids[-1:] == [tokenizer.eos_id] else ids
    messages = [{"role": "user", "content": prompt}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return encode_prompt(messages, tokenizer, template)
    except RecordError as error:
        raise BadInput(str(error)) from error
