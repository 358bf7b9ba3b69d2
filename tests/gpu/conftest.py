"""Tests on GPUs choose bodies of ops."""

from tests.helpers.bodies import same_numbers_and_automatic_bodies

__all__ = ["same_numbers_and_automatic_bodies"]
