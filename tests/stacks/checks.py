"""All checks that take two processes, by name: generators of the parts that have held."""

from functools import partial

from tests.stacks.flow import flow
from tests.stacks.wrappings import STACKS

CHECKS = {name: partial(flow, stack) for name, stack in STACKS.items()}
