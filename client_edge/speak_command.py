"""`splitfl generate` and `splitfl chat`: their arguments. Their work is imported when they run."""

import argparse
import json
import sys
from typing import Any

from client_edge.command import ACCEPT, add_accept_argument
from splitfl.command_line import add_config_arguments
from splitfl.errors import ConfigError, DataError


class Generate:
    """Generate from one prompt."""

    summary = "generate text after a prompt, which stays here, with the run's model and the server's blocks"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        add_config_arguments(parser)
        parser.add_argument("--prompt", help="the text to go on from; standard input without it")
        _add_ways(parser)
        add_accept_argument(parser)
        parser.add_argument("--num-beams", type=int, default=1, metavar="N", help="beams to search with (default 1)")
        parser.add_argument("--json", action="store_true", help="print prompt and text as JSON, at the end")

    def run(self, arguments: argparse.Namespace) -> None:
        """Print what the model says, and nothing else, on standard output."""
        how = _ways(arguments)
        if arguments.num_beams < 1:
            raise ConfigError(f"--num-beams must be 1 or more, got {arguments.num_beams}")
        how["num_beams"] = arguments.num_beams
        prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt is None else arguments.prompt
        if not prompt:
            raise DataError("an empty prompt: there is nothing to go on from")
        from client_edge.generating.speak import plain_lines, printer, speaker
        from splitfl.config.trees import ClientConfig

        config = ClientConfig.load(arguments.config, arguments.overrides)
        with speaker(config, accept=ACCEPT if arguments.accept else False) as said:
            is_streamed = not arguments.json and arguments.num_beams == 1  # beams are settled at the end only
            text = said.reply(prompt, how, printer(said.tokenizer) if is_streamed else None)
        if arguments.json:
            sys.stdout.write(json.dumps({"prompt": prompt, "text": text}) + "\n")
        elif not is_streamed:
            sys.stdout.write(plain_lines(text) + "\n")


class Chat:
    """Talk with the model."""

    summary = "chat with the run's model: turns stay here, the server computes the blocks in between"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments."""
        add_config_arguments(parser)
        parser.add_argument("--system", default="", help="an instruction to the assistant before the first turn")
        _add_ways(parser)
        add_accept_argument(parser)

    def run(self, arguments: argparse.Namespace) -> None:
        """Answer a line at a time, until Ctrl-D, or Ctrl-C where a line is waited for."""
        how = _ways(arguments)
        from client_edge.generating.speak import chat, speaker
        from splitfl.config.trees import ClientConfig

        config = ClientConfig.load(arguments.config, arguments.overrides)
        with speaker(config, accept=ACCEPT if arguments.accept else False) as said:
            chat(said, how, system=arguments.system)


def _add_ways(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="tokens to generate at most (default 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sample at this temperature; 0, the default, is greedy",
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample from this share of the likeliest")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")


def _ways(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return arguments of `generate`; raise `ConfigError` for values that mean nothing."""
    if arguments.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be 1 or more, got {arguments.max_new_tokens}")
    if arguments.temperature < 0:
        raise ConfigError(f"--temperature must be 0 or more, got {arguments.temperature}")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {arguments.top_p}")
    how: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    if not arguments.temperature:
        return how | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return how | {"do_sample": True, "temperature": arguments.temperature, "top_p": arguments.top_p}
