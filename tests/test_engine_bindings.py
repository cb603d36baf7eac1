"""What a device's loop is bound to, without a device: caches in place, hidden and latent trading places."""

from __future__ import annotations

import pytest
from conftest import MakeCheckpoint, MakePackage
from melt_runtime import Package
from melt_runtime.backends.bindings import loop_bindings, state_buffers
from melt_runtime.package.manifest import Manifest


@pytest.fixture(scope="module", params=["standard", "portable"])
def manifest(request: pytest.FixtureRequest, make_package: MakePackage, make_checkpoint: MakeCheckpoint) -> Manifest:
    """A small package in either dialect that engines are built from."""
    return Package.open(make_package(make_checkpoint(), dialect=request.param)).manifest


@pytest.mark.parametrize("batch", [1, 8])
def test_the_buffers_are_the_state_to_the_byte(manifest: Manifest, batch: int) -> None:
    assert sum(state_buffers(manifest, batch).values()) == manifest.state_bytes(batch)


def test_a_cache_is_read_and_written_at_one_address_unless_it_is_only_read(manifest: Manifest) -> None:
    inputs, outputs = loop_bindings(manifest, 2, 1, 64, current=0)
    read = {binding.tensor: binding for binding in inputs}
    written = {binding.tensor: binding for binding in outputs}
    for state in manifest.states:
        same = read[state.input].buffer == written[state.output].buffer
        assert same == (state.kind == "in_place")


def test_what_one_loop_writes_the_next_one_reads(manifest: Manifest) -> None:
    _, first = loop_bindings(manifest, 2, 1, 64, current=0)
    second, _ = loop_bindings(manifest, 2, 1, 64, current=1)
    written = {binding.tensor: binding.buffer for binding in first}
    read = {binding.tensor: binding.buffer for binding in second}
    for state in manifest.states:
        if state.kind != "read_only":
            assert written[state.output] == read[state.input]


def test_every_state_tensor_has_an_allocated_buffer_that_holds_it(manifest: Manifest) -> None:
    sizes = state_buffers(manifest, 2)
    states = {name for state in manifest.states for name in (state.input, state.output)}
    for bindings in loop_bindings(manifest, 2, manifest.chunk, 64, current=1):
        for binding in bindings:
            if binding.tensor in states:
                count = 4
                for dim in binding.shape:
                    count *= dim
                assert count <= sizes[binding.buffer]


def test_the_mask_is_as_wide_as_the_bucket(manifest: Manifest) -> None:
    inputs, _ = loop_bindings(manifest, 2, 3, 96, current=0)
    assert next(b.shape for b in inputs if b.tensor == "attention_mask") == (2, 1, 3, 96)
