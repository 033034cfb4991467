"""Uploads in a folder and the layers that they are folded into: the parts that merges of every kind have."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packed import UNAGREED
from torch import Tensor

from server_backbone.merging.layers import Layers
from server_backbone.merging.merging import Shared, fold
from server_backbone.merging.uploads import Seen, Taken, Uploads, Weighed
from splitfl.federation.strategy import Strategy
from splitfl.protocol.messages import Upload


@dataclass
class Folding:
    """One upload for each client."""

    layers: Layers
    uploads: Uploads

    @classmethod
    def of(cls, strategy: Strategy, first: Mapping[str, Tensor], folder: Path, weight_by: Any = "uniform") -> "Folding":
        return cls(Layers(strategy, first), Uploads(list(first), folder, weight_by, UNAGREED))

    def spool(self, client_id: str, upload: Upload, seen: Seen | None = None) -> Taken:
        return self.uploads.spool(client_id, upload, self.layers.held, seen)

    def merge(self, clients: Collection[str], **options: Any) -> Weighed:
        weighed, _ = fold(self.uploads, clients, self.layers, Shared(), **options)
        return weighed
