"""Joining a run to generate with its model: `splitfl generate` and `splitfl chat`. Text stays on this machine."""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from client_edge.connection.connection import Connection
from client_edge.consent.gate import Gate, answers_for, folder_of
from client_edge.generating.generation import RemoteGenerator
from client_edge.link.files import Files
from client_edge.link.received import fetch_description, fetch_layers
from client_edge.screen import screen
from splitfl.config.trees import ClientConfig
from splitfl.durability.disk import make_private_dir
from splitfl.errors import DataError, ModelError
from splitfl.models.context import room_after
from splitfl.models.cut import Cut
from splitfl.models.foreign import foreign_tokenizer
from splitfl.protocol.roles import Role
from splitfl.session.client_session import ClientSession
from splitfl.training.device import open_device
from splitfl.training.terms import merged_layers, terms_of

# Control characters but line ends and tabs, and characters that turn the direction of writing.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speaker:
    """A model whose middle is on a server, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    connection: Connection

    def reply(self, prompt: str, how: Mapping[str, Any], streamer: BaseStreamer | None = None) -> str:
        """Return what the model says after a prompt; `how` are arguments of `generate`, and a `seed`."""
        return self._generate(self.tokenizer(prompt, return_tensors="pt"), how, streamer)

    def answer(
        self, messages: Sequence[Mapping[str, str]], how: Mapping[str, Any], streamer: BaseStreamer | None = None
    ) -> str:
        """Return the assistant's turn after these; raise `ModelError` without a chat template."""
        self.require_chat_template()
        given = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        return self._generate(given, how, streamer)

    def require_chat_template(self) -> None:
        """Raise `ModelError` for a tokenizer that does not know how turns are written."""
        if not self.tokenizer.chat_template:
            raise ModelError(
                "this model's tokenizer has no chat template, so it was not made for chats: use `splitfl generate`"
            )

    def _generate(self, given: BatchEncoding, how: Mapping[str, Any], streamer: BaseStreamer | None) -> str:
        num_given = given["input_ids"].shape[1]
        if not num_given:
            raise DataError("an empty prompt: there is nothing to go on from")
        how = dict(how)
        torch.manual_seed(how.pop("seed", 0))
        how["max_new_tokens"] = room_after(self.model.config, num_given, how["max_new_tokens"])
        inputs = {name: given[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        padding = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        said = self.model.generate(**inputs, pad_token_id=padding, streamer=streamer, **how)
        return str(self.tokenizer.decode(said[0, num_given:], skip_special_tokens=True))


def printer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """Return what prints a text to standard output while it is generated."""
    return _PlainStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class _PlainStreamer(TextStreamer):  # type: ignore[misc]  # transformers does not say of which type it is
    """Prints lines of text and nothing that steers a terminal: the server decides which tokens these are."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece."""
        super().on_finalized_text(plain_lines(text), stream_end=stream_end)


def plain_lines(text: str) -> str:
    """Make a generated text fit for a terminal: lines and tabs stay, other control characters do not."""
    return _STEERS.sub("?", text)


def chat(said: Speaker, how: Mapping[str, Any], *, system: str) -> None:
    """Answer lines of standard input, each with all turns before it, until there are no more or Ctrl-C."""
    said.require_chat_template()
    turns = [{"role": "system", "content": system}] if system else []
    while (line := _ask()) is not None:
        if not line.strip():
            continue
        question = {"role": "user", "content": line}
        try:
            text = said.answer([*turns, question], how, printer(said.tokenizer))
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            return
        turns += [question, {"role": "assistant", "content": text}]


def _ask() -> str | None:
    """Return a line, None at the end of the input or at Ctrl-C."""
    try:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    if not line:
        sys.stderr.write("\n")
        return None
    return line.rstrip("\n")


@contextmanager
def speaker(config: ClientConfig, *, accept: bool | str = False) -> Iterator[Speaker]:
    """Join a run, without taking part in its rounds, and bring the model here as far as it is this side's.

    Weights are the run's: the first ones, or the last merge's. What the server sees is to be accepted as in
    `take_part`.
    """
    client = config.client
    if client.num_threads:
        torch.set_num_threads(client.num_threads)
    device = open_device(client.device, "client.device")
    connection = Connection(client, Gate(client, config.policy, answers_for(accept, _tell)))
    connection.leaving = "generated"
    try:
        folder = folder_of(client, connection.welcome.run_id)
        make_private_dir(folder)
        files = Files(connection)
        directory = fetch_description(files, client, folder)
        cut = fetch_layers(files, client, directory, device)
        connection.agree(lambda run: ClientSession(terms_of(run, cut)))
        _take_merged_layers(connection, cut)
        tokenizer = foreign_tokenizer(directory)
        yield Speaker(
            model=cut.client_model(RemoteGenerator(connection)).eval(), tokenizer=tokenizer, connection=connection
        )
    finally:
        connection.close()


def _tell(text: str) -> None:
    screen().print(text, markup=False, highlight=False)


def _take_merged_layers(connection: Connection, cut: Cut) -> None:
    resumed = connection.resume(held_round=0, step=0, commit_number=0, pending_step=0)
    if not resumed.layers:
        return
    merged = merged_layers(connection.run, cut)
    tensors = connection.tensors
    with torch.no_grad():
        # controls may come after the layers
        for parameter, layer in zip(merged.values(), resumed.layers[: len(merged)], strict=True):
            parameter.copy_(tensors.unpack(Role.LAYER, layer))
