"""What all sections of the configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping with known keys: any other key is an error."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)
