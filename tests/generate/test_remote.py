"""Generation over TCP: tokens are the unsplit model's, one round trip each, and a server that says why not."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, free_port, tiny_tokenizer, write_text
from generate.host import Host
from generate.test_near import WAYS, tokens, whole_model
from safetensors.torch import load_file
from test_wire import Recorder, Secrets
from transformers import PreTrainedModel, TextStreamer

from client_edge.connection.endings import SessionLost
from client_edge.generating.speak import Speaker, speaker
from client_edge.part.run import take_part
from splitfl.config.own import DataSection
from splitfl.config.trees import ClientConfig
from splitfl.errors import DataError, ModelError, Refused
from splitfl.protocol.messages import Decode, EndCache
from splitfl.stopping import Stopped, StopRequest

FAMILIES = [
    *("llama", "mistral", "gpt2", "gemma2", "qwen3"),
    pytest.param("mixtral", marks=pytest.mark.slow),  # its checkpoint is rewritten first
]
ENDS = {"mistral": (0, 0), "gpt2": (1, 0), "gemma2": (0, 1)}


def write(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Start servers of a llama, or of another model, and stop them in the end."""
    hosts: list[Host] = []

    def start(whole: PreTrainedModel | None = None, **sections: Any) -> Host:
        path = write(whole or whole_model("llama"), tmp_path / "model")
        hosts.append(Host(tmp_path, path, **sections))
        return hosts[-1]

    yield start
    for each in hosts:
        each.stop()


def sent(said: Speaker) -> list[Any]:
    """Record the messages of a connection from now on."""
    messages: list[Any] = []
    send = said.connection.send
    said.connection.send = lambda message: (messages.append(message), send(message))[1]  # type: ignore[method-assign]
    return messages


class TestTokens:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_they_are_the_whole_models(self, family: str, host: Callable[..., Host]) -> None:
        model = whole_model(family)
        bottom, top = ENDS.get(family, (1, 1))
        served = host(model, model={"bottom_layers": bottom, "top_layers": top})
        with speaker(served.client(), accept=True) as said:
            for name, way in WAYS.items():
                assert tokens(said.model, **way) == tokens(model, **way), name

    def test_one_round_trip_each_and_the_cache_is_freed(self, host: Callable[..., Host]) -> None:
        with speaker(host().client(), accept=True) as said:
            messages = sent(said)
            tokens(said.model, num_beams=3)
            decodes, ends = ([m for m in messages if isinstance(m, kind)] for kind in (Decode, EndCache))
            assert [m.hidden_BSD.shape[1] for m in decodes] == [9] + [1] * 11
            assert {m.beams_B for m in decodes[2:]} != {()}
            assert [m.cache_id for m in ends] == [decodes[0].cache_id]
            assert len(messages) == len(decodes) + 1

    def test_a_prompt_longer_than_a_message_comes_in_pieces(self, host: Callable[..., Host]) -> None:
        served = host(
            text={"max_seq_length": 2},
            federation={"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
        )
        with speaker(served.client(), accept=True) as said:
            messages = sent(said)
            assert tokens(said.model) == tokens(whole_model("llama"))
            sizes = [m.hidden_BSD.shape[1] for m in messages if isinstance(m, Decode)]
            assert sizes == [2, 2, 2, 2, 1] + [1] * 11

    def test_no_token_crosses(self, host: Callable[..., Host]) -> None:
        served, port, prompt = host(), free_port(), "a secret of the patient's"
        recorder = Recorder(port, int(served.address.rsplit(":", 1)[1]))
        with recorder.running():
            with speaker(served.client(address=f"tcp://127.0.0.1:{port}"), accept=True) as said:
                messages = sent(said)
                text = said.reply(prompt, {"max_new_tokens": 12, "do_sample": False})
            served.stop()  # so that no connection is left when the recorder ends
            (prefill, *_) = [message for message in messages if isinstance(message, Decode)]
        secrets = Secrets()
        for each in (prompt, text):
            secrets.add_text(each)
            secrets.add_ids(said.tokenizer(each)["input_ids"], "token ids")
        assert len(secrets.needles) > 20
        assert secrets.found_in(recorder.streams) == []
        assert any(bytes(prefill.hidden_BSD.buffers[0]) in stream for stream in recorder.streams), "no hole in the net"

    def test_without_a_cache(self, host: Callable[..., Host]) -> None:
        with speaker(host().client(), accept=True) as said:
            assert tokens(said.model, use_cache=False) == tokens(whole_model("llama"))

    def test_they_are_streamed(self, host: Callable[..., Host], capsys: pytest.CaptureFixture[str]) -> None:
        with speaker(host().client(), accept=True) as said:
            how = {"max_new_tokens": 6, "do_sample": False}
            said_at_once = said.reply("abc", how)
            capsys.readouterr()
            said.reply("abc", how, TextStreamer(said.tokenizer, skip_prompt=True, skip_special_tokens=True))
            assert capsys.readouterr().out == said_at_once + "\n"


def test_layers_are_those_of_the_last_merge(host: Callable[..., Host], tmp_path: Path) -> None:
    served = host(federation={"num_rounds": 100, "local_steps": 30})
    write_text(tmp_path / "text.txt", num_lines=20, seed=0)
    trainer = served.client("trainer").client.model_copy(update={"reconnect_timeout": 0.1})
    config = ClientConfig(client=trainer, data=DataSection(path=tmp_path / "text.txt", eval_fraction=0.0))

    stop = StopRequest()

    def train() -> None:
        with contextlib.suppress(Stopped):  # it is not let come to its end
            take_part(config, accept=True, stop=stop)

    thread = threading.Thread(target=train)
    thread.start()
    while not (served.folder / "run" / "trained.safetensors").exists():
        time.sleep(0.05)
    stop.ask()  # so that no further merge comes while this one's layers are looked at
    thread.join()
    with speaker(served.client(), accept=True) as said:
        merged = load_file(served.folder / "run" / "trained.safetensors")
        here = {name: p for name, p in said.model.named_parameters() if ".lora_" in name}
        first = [name for name in here if name in merged and ".layers.0." in name]
        assert first
        assert all(torch.equal(here[name], merged[name]) for name in first)
        assert any(here[name].any() for name in first if ".lora_B." in name), "what it began with is zero"
    served.stop()


class TestDeclined:
    """Each is a sentence; the session goes on, and no strike is counted."""

    def test_too_many_tokens(self, host: Callable[..., Host]) -> None:
        with speaker(host(link={"max_cache_tokens": 40}).client(), accept=True) as said:
            with pytest.raises(Refused, match=r"more than link\.max_cache_tokens = 40"):
                tokens(said.model)
            assert tokens(said.model, lengths=(9,)) == tokens(whole_model("llama"), lengths=(9,))

    def test_too_many_caches(self, host: Callable[..., Host]) -> None:
        ids_BS = torch.randint(3, VOCABULARY, (1, 4))
        with speaker(host(link={"max_caches": 1}).client(), accept=True) as said, torch.no_grad():
            first = said.model(ids_BS, use_cache=True)
            with pytest.raises(Refused, match=r"link\.max_caches is 1"):
                said.model(ids_BS, use_cache=True)
            said.model(ids_BS[:, :1], past_key_values=first.past_key_values, use_cache=True)
            del first
            said.model(ids_BS, use_cache=True)

    def test_a_cache_that_timed_out(self, host: Callable[..., Host]) -> None:
        ids_BS = torch.randint(3, VOCABULARY, (1, 4))
        with speaker(host(link={"cache_timeout": 0.2}).client(), accept=True) as said, torch.no_grad():
            first = said.model(ids_BS, use_cache=True)
            time.sleep(1)
            with pytest.raises(Refused, match=r"link\.cache_timeout = 0\.2 s: begin the generation anew"):
                said.model(ids_BS[:, :1], past_key_values=first.past_key_values, use_cache=True)
            said.model(ids_BS, use_cache=True)

    def test_a_cache_of_a_session_that_ended(self, host: Callable[..., Host]) -> None:
        ids_BS = torch.randint(3, VOCABULARY, (1, 4))
        served = host()
        with speaker(served.client(), accept=True) as said, torch.no_grad():
            first = said.model(ids_BS, use_cache=True)
            said.connection.reconnect(SessionLost("as a test wants it"), resume_at=1)
            said.connection.resume(held_round=0, step=0, commit_number=0, pending_step=0)
            with pytest.raises(Refused, match="the session in which this generation began has ended"):
                said.model(ids_BS[:, :1], past_key_values=first.past_key_values, use_cache=True)
            said.model(ids_BS, use_cache=True)

    def test_a_prompt_longer_than_the_context(self, host: Callable[..., Host]) -> None:
        with speaker(host(whole_model("llama", max_position_embeddings=8)).client(), accept=True) as said:
            messages = sent(said)
            with pytest.raises(DataError, match="9 tokens, more than the 8"):
                tokens(said.model)
            assert not messages

    def test_two_generations_at_once(self, host: Callable[..., Host]) -> None:
        errors: list[Exception] = []
        with speaker(host().client(), accept=True) as said:
            under_way, is_refused = threading.Event(), threading.Event()
            pieces: list[Any] = []

            class Held(TextStreamer):
                def put(self, value: Any) -> None:
                    pieces.append(value)
                    if len(pieces) == 3:  # the prompt comes before anything is asked for
                        under_way.set()
                        is_refused.wait(20)

            def second() -> None:
                under_way.wait(20)
                try:
                    tokens(said.model, lengths=(9,))
                except ModelError as error:
                    errors.append(error)
                finally:
                    is_refused.set()

            thread = threading.Thread(target=second)
            thread.start()
            first = tokens(said.model, lengths=(9,), streamer=Held(said.tokenizer))
            thread.join()
            assert first == tokens(whole_model("llama"), lengths=(9,))
            assert ["two generations at once" in str(error) for error in errors] == [True]

    def test_training_with_it(self, host: Callable[..., Host]) -> None:
        with speaker(host().client(), accept=True) as said, pytest.raises(ModelError, match="for generating"):
            said.model(torch.ones(1, 4, dtype=torch.long), use_cache=False)
