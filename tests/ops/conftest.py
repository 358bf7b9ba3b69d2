"""Tests of ops choose bodies."""

from tests.helpers.bodies import same_numbers_and_automatic_bodies

__all__ = ["same_numbers_and_automatic_bodies"]
