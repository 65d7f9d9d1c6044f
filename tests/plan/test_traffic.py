"""Collectives read from compiled programs: each form that compilers print, and numbers that can be counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from luthier.plan import bandwidth, hlo, traffic
from luthier.plan.traffic import Collective

HEADER = "HloModule jit_step, is_scheduled=true, num_partitions=8\n\n"
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def entry(*lines: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"\nENTRY %main (p: f32[8,128]) -> f32[8,128] {{\n  %p = f32[8,128]{{1,0:T(8,128)}} parameter(0)\n{body}\n}}\n"
    )


def only(text: str) -> Collective:
    (found,) = traffic.collectives(HEADER + ADD + text)
    return found


WHOLE = 8 * 128 * 4


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        ("all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", "all-gather", 3 * WHOLE),
        ("all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 2 * WHOLE * 3 / 4),
        ("all-reduce-start(%p), replica_groups=[2,4]<=[8], to_apply=%add", "all-reduce", 2 * WHOLE * 3 / 4),
        ("reduce-scatter(%p), replica_groups={}, dimensions={0}, to_apply=%add", "reduce-scatter", WHOLE * 7 / 8),
        ("all-to-all(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}", "all-to-all", WHOLE / 2),
        ("collective-permute(%p), source_target_pairs={{0,1},{1,2}}", "collective-permute", WHOLE),
    ],
)
def test_what_a_collective_sends(line, kind, sent):
    found = only(entry(f"ROOT %out = f32[8,128]{{1,0}} {line}"))
    assert (found.kind, found.bytes, found.times) == (kind, sent, 1)


@pytest.mark.parametrize(
    ("groups", "first", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", (0, 1), ("tensor",)),
        ("[4,2]<=[2,2,2]T(0,2,1)", (0, 2), ("fsdp",)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4), ("data",)),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3), ("fsdp", "tensor")),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1':(1)2}", (0, 2), ("fsdp",)),
        ("mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", (0, 2), ("fsdp",)),
        ("{}", tuple(range(8)), ("data", "fsdp", "tensor")),
    ],
)
def test_which_devices_speak_to_each_other(groups, first, axes):
    found = only(entry(f"ROOT %out = f32[8,128]{{1,0}} all-reduce(%p), replica_groups={groups}, to_apply=%add"))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    assert found.group == first
    assert found.axes(mesh) == axes


def test_an_unknown_form_of_groups_is_no_guess():
    with pytest.raises(ValueError, match="unknown form"):
        only(entry("ROOT %out = f32[8,128]{1,0} all-reduce(%p), replica_groups=everyone, to_apply=%add"))


def test_a_tpu_hides_a_reduce_scatter_in_a_fusion():
    fused = """
%all-reduce-scatter.1 (input: f32[8,128]) -> f32[1,128] {
  %input = f32[8,128]{1,0} parameter(0)
  %all-reduce = f32[8,128]{1,0} all-reduce(%input), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %cut = f32[1,128]{1,0} dynamic-slice(%all-reduce, %zero, %zero), dynamic_slice_sizes={1,128}
}
"""
    call = 'ROOT %out = f32[1,128]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="a/b"}'
    found = only(fused + entry(call))
    assert (found.kind, found.bytes, found.scope) == ("reduce-scatter", WHOLE * 7 / 8, "a/b")


LOOP = """
%body (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%state), index=1
  %by = s32[] constant(STEP)
  %next = s32[] add(%i, %by)
  %reduced = f32[8,128]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add
  ROOT %after = (s32[], f32[8,128]) tuple(%next, %reduced)
}

%condition (state: (s32[], f32[8,128])) -> pred[] {
  %state = (s32[], f32[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %end = s32[] constant(7)
  ROOT %go = pred[] compare(%i, %end), direction=LT
}
"""


@pytest.mark.parametrize(("step", "known", "times"), [(1, "", 7), (2, "", 4), (1, '"known_trip_count":{"n":"5"}', 5)])
def test_loops_count_as_often_as_they_turn(step, known, times):
    lines = (
        "%zero = s32[] constant(0)",
        "%start = (s32[], f32[8,128]) tuple(%zero, %p)",
        "ROOT %out = (s32[], f32[8,128]) while(%start), condition=%condition, body=%body"
        + (f", backend_config={{{known}}}" if known else ""),
    )
    assert only(LOOP.replace("STEP", str(step)) + entry(*lines)).times == times


def test_what_jax_compiles_is_counted_to_the_byte():
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"))
    width = 64

    def step(x_BD: jax.Array, w_LDD: jax.Array) -> jax.Array:
        def layer(x_BD: jax.Array, w_DD: jax.Array):
            return jnp.tanh(x_BD @ w_DD), None

        return jnp.sum(jax.lax.scan(layer, x_BD, w_LDD)[0])

    x = jax.ShapeDtypeStruct((16, width), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))
    w = jax.ShapeDtypeStruct((5, width, width), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    program = jax.jit(step).lower(x, w).compile()
    totals = traffic.by_axes(traffic.collectives(program), mesh)
    gathered = {axes: size for (kind, axes), size in totals.items() if kind == "all-gather"}
    assert gathered == {("fsdp",): 5 * width * width * 4 * 3 / 4}


def test_memory_traffic_counts_slices_and_not_what_they_are_cut_from():
    text = """
%cutting (w: f32[32,128,128], i: s32[]) -> f32[128,128] {
  %w = f32[32,128,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,128,128]{2,1,0} dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,128,128}
  ROOT %flat = f32[128,128]{1,0} bitcast(%cut)
}

ENTRY %main (w: f32[32,128,128], i: s32[], v: f32[128,128]) -> f32[128,128] {
  %w = f32[32,128,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %v = f32[128,128]{1,0:T(8,128)S(1)} parameter(2)
  %one = f32[128,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%cutting
  ROOT %sum = f32[128,128]{1,0} add(%one, %v)
}
"""
    matrix = 128 * 128 * 4
    # The fusion reads and writes a matrix, and an index; the sum reads one, writes one, and has one at hand.
    assert bandwidth.moved(hlo.parse(HEADER + text)) == 4 * matrix + 4


def test_what_goes_between_slices_is_handed_to_the_hosts():
    """A TPU's program sends it off with a note for the runtime."""
    note = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    line = f"ROOT %out = (f32[8,128]{{1,0}}, u32[], token[]) send(%p), frontend_attributes={{{note}}}"
    found = only(entry(line))
    assert (found.kind, found.slices, found.bytes) == ("all-reduce", 2, WHOLE)
