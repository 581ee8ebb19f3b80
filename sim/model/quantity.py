"""Numbers with the limits that files hold them to (`sim.model.files.shape` says so where one is outside)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

MOST = 2**53  # that a float counts exactly
MOST_SECONDS = 86400  # no pass of a model, nor a way through a network, takes a day

Count = Annotated[int, Meta(gt=0)]
Positive = Annotated[float, Meta(gt=0)]
NotNegativeInt = Annotated[int, Meta(ge=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Size = Annotated[int, Meta(ge=1, le=MOST)]
Countable = Annotated[float, Meta(ge=0, le=MOST)]
Seconds = Annotated[float, Meta(ge=0, le=MOST_SECONDS)]
