"""The trees of settings: what both roles agree on, the server's file and a client's."""

import json
from pathlib import Path
from typing import ClassVar, Self

from pydantic import model_validator

from splitfl.config.own import ClientSection, DataSection, PolicySection, ServerSection
from splitfl.config.reading import Config
from splitfl.config.rules import check
from splitfl.config.run import RunSettings


class RunConfig(RunSettings):
    """What both roles must agree on; the welcome carries it to every client."""

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        check(self)
        return self


class ServerConfig(RunConfig):
    """The server's file: the run's settings and the server's own."""

    command: ClassVar[str] = "server"
    needs: ClassVar[str] = "[model], [federation] and [server]"

    server: ServerSection = ServerSection()

    @classmethod
    def of_the_other_role(cls) -> type[Config]:
        """Return a client's tree."""
        return ClientConfig

    def run_config(self) -> RunConfig:
        """Return what the clients get: the model's name without the server's folders, and nothing of `[server]`."""
        settings = json.loads(self.to_json())
        settings["model"]["model_name_or_path"] = Path(self.model.model_name_or_path).name
        return RunConfig.model_validate(settings)

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if not self.model.model_name_or_path:
            raise ValueError("model.model_name_or_path is empty: name a model directory or a hub id")
        return self


class ClientConfig(Config):
    """A client's file."""

    command: ClassVar[str] = "client"
    needs: ClassVar[str] = "[client] and [data]"

    client: ClientSection = ClientSection()
    data: DataSection = DataSection()
    policy: PolicySection = PolicySection()

    @classmethod
    def of_the_other_role(cls) -> type[Config]:
        """Return the server's tree."""
        return ServerConfig

    @model_validator(mode="after")
    def _has_a_name(self) -> Self:
        if not self.client.client_id:
            raise ValueError("client.client_id is empty: give this client a name, such as clinic-a")
        return self
