import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from few import changed
from few import stage as stage_of

from compofa.errors import SpaceError
from compofa.networks.families.mobilenet_v3 import MOBILENET_V3
from compofa.networks.families.proxyless import PROXYLESS
from compofa.seeds import rng
from compofa.space.coupling import parse_coupling
from compofa.space.genes import GeneCode
from compofa.space.search_space import SearchSpace
from compofa.space.subnet import Subnet

FREE = MOBILENET_V3.free_space()
COMPOUND = MOBILENET_V3.compound_space()
ELASTIC = MOBILENET_V3.compound_space(elastic=True)
OWN = MOBILENET_V3.compound_space(parse_coupling("1:2.5,3:4"), elastic=True)

SPACES = {
    "free": FREE,
    "compound": COMPOUND,
    "elastic": ELASTIC,
    "own coupling": OWN,
    "free, fixed kernels": MOBILENET_V3.compound_space(None),
    "resolutions": MOBILENET_V3.compound_space(resolutions=(160, 176, 192)),
    "proxyless": PROXYLESS.free_space(),
    "one depth": FREE.restrict(depth=(3,), kernel=(7, 3)),
    "stages that differ": SearchSpace(
        "mixed",
        (
            stage_of((1, 2), (3, 5), (6, 3)),
            stage_of((2, 1), (3,), (3, 4.5), ((2, 4.5), (1, 3))),
            stage_of((2,), (5,), (4,)),
        ),
        slots=2,
        resolutions=(64, 32),
    ),
}
SMALL = {
    "two by two": SearchSpace("s", (stage_of((1, 2), (3, 5), (3, 4)),), 2, (32, 64)),
    "compound": COMPOUND,
    "elastic": SearchSpace("e", ELASTIC.stages[:2], 4),
    "proxyless": PROXYLESS.compound_space(),
    "stages that differ": SPACES["stages that differ"],
}


def disturb_global_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def each(spaces: dict[str, SearchSpace]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("space", spaces.values(), ids=spaces.keys())


# --- sizes and enumeration ---


def test_sizes_are_those_of_the_papers() -> None:
    assert COMPOUND.size == 243
    assert ELASTIC.size == 117**5
    assert FREE.size == (9**2 + 9**3 + 9**4) ** 5
    assert OWN.size == (3 + 3**3) ** 5


def test_size_counts_resolutions_and_stages() -> None:
    assert SPACES["resolutions"].size == 3 * 243
    # (4 + 16) stages of the first kind, 2 of the second, 1 of the third, 2 resolutions.
    assert SPACES["stages that differ"].size == 20 * 2 * 2


@each(SMALL)
def test_enumeration_yields_every_subnet_once(space: SearchSpace) -> None:
    subnets = list(space.enumerate())
    assert len(subnets) == space.size == len(set(subnets))
    assert all(space.contains(subnet) for subnet in subnets)
    assert {space.smallest, space.largest} <= set(subnets)
    assert (space.genes_of(space.arrays_of(subnets)) == space.enumerate_genes()).all()


def test_too_large_a_space_is_not_enumerated() -> None:
    with pytest.raises(SpaceError, match="sample"):
        ELASTIC.enumerate_genes()


# --- genes ---


@each(SPACES)
def test_decoding_what_was_encoded_gives_it_back(space: SearchSpace) -> None:
    genes = space.sample_genes(rng(1), 200)
    subnets = list(space.subnets_of(space.arrays(genes)))
    assert (np.stack([space.encode(subnet) for subnet in subnets]) == genes).all()
    assert [space.decode(row) for row in genes] == subnets
    assert all(space.contains(subnet) for subnet in subnets)


@each(SPACES)
def test_arrays_hold_what_subnets_hold(space: SearchSpace) -> None:
    arrays = space.arrays(space.sample_genes(rng(2), 50))
    for row, subnet in enumerate(space.subnets_of(arrays)):
        blocks = [
            block
            for kept in subnet.stages
            for block in (*kept, *[(0, 0)] * space.slots)[: space.slots]
        ]
        assert arrays.blocks["kernel"][row].tolist() == [kernel for kernel, _ in blocks]
        assert arrays.blocks["expand"][row].tolist() == [expand for _, expand in blocks]
        assert arrays.depths[row].tolist() == list(subnet.depths)
        assert arrays.resolutions[row] == subnet.resolution


@each(SPACES)
def test_canonical_genes_forget_blocks_past_the_depth_and_nothing_else(space: SearchSpace) -> None:
    generator = rng(3)
    raw = generator.integers(0, space.cardinalities, size=(300, len(space.genes)))
    canonical = space.canonical(raw)
    assert list(space.subnets_of(space.arrays(raw))) == list(
        space.subnets_of(space.arrays(canonical))
    )
    depths = space.arrays(raw).depths
    for column, gene in enumerate(space.genes):
        past = np.zeros(300, bool) if gene.slot is None else depths[:, gene.stage] <= gene.slot
        assert (canonical[past, column] == 0).all()
        assert (canonical[~past, column] == raw[~past, column]).all()


@each(SPACES)
def test_genes_say_what_they_stand_for(space: SearchSpace) -> None:
    genes = space.sample_genes(rng(4), 20)
    arrays = space.arrays(genes)
    for row, picked in enumerate(genes):
        for gene, choice in zip(space.genes, picked, strict=True):
            for variable, value in gene.options[choice].items():
                if variable == "resolution":
                    assert arrays.resolutions[row] == value
                elif variable == "depth":
                    assert arrays.depths[row, gene.stage] == value
                elif (gene.slot or 0) < arrays.depths[row, gene.stage]:
                    block = gene.stage * space.slots + (gene.slot or 0)
                    assert arrays.blocks[variable][row, block] == value


def test_values_past_the_depth_do_not_count_when_encoding() -> None:
    arrays = FREE.arrays(FREE.sample_genes(rng(5), 100))
    past = arrays.blocks["kernel"] == 0
    assert past.any()
    junk = changed(
        arrays,
        kernel=np.where(past, 99, arrays.blocks["kernel"]),
        expand=np.where(past, 7, arrays.blocks["expand"]),
    )
    assert (FREE.genes_of(junk) == FREE.genes_of(arrays)).all()


@pytest.mark.parametrize(
    ("name", "column", "value"),
    [
        ("kernel", 8, 9),
        ("kernel", 0, 0),
        ("expand", 4, 5),
        ("expand", 4, np.nan),
        ("depths", 1, 7),
        ("depths", 0, 0),
    ],
)
@each({name: SPACES[name] for name in ("free", "elastic", "compound")})
def test_rows_outside_are_named(space: SearchSpace, name: str, column: int, value: float) -> None:
    arrays = space.arrays(space.sample_genes(rng(6), 10))
    values = (arrays.depths if name == "depths" else arrays.blocks[name]).astype(float)
    values[7, column] = value
    with pytest.raises(SpaceError, match="row 7"):
        space.genes_of(changed(arrays, **{name: values}))


def test_a_resolution_outside_is_named() -> None:
    arrays = COMPOUND.arrays(COMPOUND.sample_genes(rng(6), 3))
    with pytest.raises(SpaceError, match="row 2"):
        COMPOUND.genes_of(changed(arrays, resolutions=np.array([224, 224, 160])))


def test_arrays_of_another_shape_are_refused() -> None:
    arrays = COMPOUND.arrays(COMPOUND.sample_genes(rng(6), 3))
    with pytest.raises(SpaceError, match="19"):
        COMPOUND.genes_of(changed(arrays, kernel=arrays.blocks["kernel"][:, :19]))


@pytest.mark.parametrize("value", [-1, 3])
def test_genes_out_of_range_are_refused(value: int) -> None:
    genes = np.zeros(len(COMPOUND.genes), int)
    genes[2] = value
    with pytest.raises(SpaceError, match="genes"):
        COMPOUND.decode(genes)
    with pytest.raises(SpaceError, match="6 genes"):
        COMPOUND.decode(genes[:-1])


@pytest.mark.parametrize("n", [0, 1])
@each(SPACES)
def test_few_rows_work_like_many(space: SearchSpace, n: int) -> None:
    genes = space.sample_genes(rng(7), n)
    assert genes.shape == (n, len(space.genes))
    assert (space.genes_of(space.arrays(genes)) == genes).all()


# --- sampling ---


@pytest.mark.parametrize("by", ["genes", "subnets"])
@each(SPACES)
def test_the_same_seed_gives_the_same_sample(space: SearchSpace, by: str) -> None:
    disturb_global_generators(1)
    first = space.sample_genes(rng(0, "test"), 40, by)
    disturb_global_generators(2)
    assert (space.sample_genes(rng(0, "test"), 40, by) == first).all()
    if space.size > 1000:
        assert (space.sample_genes(rng(1, "test"), 40, by) != first).any()


def test_sampling_leaves_the_global_generators_alone() -> None:
    disturb_global_generators(3)
    before = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    ELASTIC.sample_genes(rng(0), 100, "subnets")
    ELASTIC.sample(rng(0))
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def within_chance(counts: np.ndarray, shares: np.ndarray) -> bool:
    """Whether counts fit shares: each within five standard deviations of a fair draw."""
    n, shares = counts.sum(), shares / shares.sum()
    return bool((np.abs(counts - n * shares) < 5 * np.sqrt(n * shares * (1 - shares)) + 1e-9).all())


def test_sampling_is_uniform_over_genes() -> None:
    arrays = ELASTIC.arrays(ELASTIC.sample_genes(rng(8), 20_000))
    for stage in range(5):
        depths = arrays.depths[:, stage]
        assert within_chance(np.bincount(depths)[2:], np.ones(3))
        for slot in range(4):
            kernels = arrays.blocks["kernel"][depths > slot, stage * 4 + slot]
            assert within_chance(np.bincount(kernels)[[3, 5, 7]], np.ones(3))
    # Genes are independent of each other.
    assert within_chance(
        np.bincount(arrays.depths[:, 0] * 5 + arrays.depths[:, 3])[[12, 13, 14]], np.ones(3)
    )


def test_sampling_is_uniform_over_subnets_where_asked() -> None:
    space = SMALL["two by two"]
    genes = space.sample_genes(rng(9), 20_000, by="subnets")
    counts = Counter(map(tuple, genes.tolist()))
    assert len(counts) == space.size == 40
    assert within_chance(np.array(list(counts.values())), np.ones(40))


def test_the_two_ways_of_sampling_differ() -> None:
    space = SMALL["two by two"]
    shares = [
        (space.arrays(space.sample_genes(rng(9), 20_000, by)).depths == 1).mean()
        for by in ("genes", "subnets")
    ]
    # Half of the genes' choices, but only 4 of 20 stages, are of depth 1.
    assert shares == pytest.approx([0.5, 0.2], abs=0.02)


def test_deep_stages_weigh_by_their_variants_in_a_compound_space() -> None:
    depths = ELASTIC.arrays(ELASTIC.sample_genes(rng(10), 20_000, by="subnets")).depths
    for stage in range(5):
        assert within_chance(np.bincount(depths[:, stage])[2:], np.array([9, 27, 81]))


# --- restriction ---


def test_restriction_is_the_part_with_those_choices() -> None:
    part = COMPOUND.restrict(depth=(2, 4))
    assert set(part.enumerate()) == {
        subnet for subnet in COMPOUND.enumerate() if set(subnet.depths) <= {2, 4}
    }
    small = SearchSpace("s", FREE.stages[:1], 4)
    part = small.restrict(depth=(2, 3), kernel=(3, 7), expand=(6,))
    assert part.size == 2**2 + 2**3
    assert set(part.enumerate()) == {
        subnet
        for subnet in small.enumerate()
        if subnet.depths[0] < 4 and all(k != 5 and e == 6 for k, e in subnet.stages[0])
    }


def test_restricting_expand_ratios_restricts_coupled_depths() -> None:
    part = ELASTIC.restrict(expand=(3, 6))
    assert part.stages[0].depths == (2, 4)
    assert part.size == (3**2 + 3**4) ** 5


def test_restriction_sets_resolutions_and_keeps_the_rest() -> None:
    part = FREE.restrict(resolutions=(96, 128), name="low")
    assert (part.name, part.resolutions, part.stages) == ("low", (96, 128), FREE.stages)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": (5,)}, "depth"),
        ({"kernel": ()}, "kernel"),
        ({"expand": (5,)}, "stage 1"),
        ({"resolutions": ()}, "resolution"),
        ({"resolutions": (96, 96)}, "resolution"),
    ],
)
def test_a_restriction_that_leaves_nothing_is_refused(change: dict, message: str) -> None:
    for space in (FREE, ELASTIC):
        with pytest.raises(SpaceError, match=message):
            space.restrict(**change)


def test_spaces_that_would_count_wrong_are_refused() -> None:
    with pytest.raises(SpaceError, match="kernel"):
        SearchSpace("twice", (stage_of((2,), (3, 3), (4,)),), 4)
    with pytest.raises(SpaceError, match="depth"):
        SearchSpace("twice", (stage_of((2,), (3,), (3, 4), ((2, 3), (2, 4))),), 4)
    with pytest.raises(SpaceError, match=r"4 slots.* 5"):
        SearchSpace("deep", (stage_of((5,), (3,), (4,)),), 4)
    with pytest.raises(SpaceError, match="stage"):
        SearchSpace("empty", (), 4)


def test_a_space_can_be_freed_of_its_coupling() -> None:
    assert ELASTIC.free().stages == FREE.stages
    assert all(ELASTIC.free().contains(FREE.sample(rng(seed))) for seed in range(20))


def test_smallest_and_largest() -> None:
    assert COMPOUND.smallest.depths == (2,) * 5
    assert COMPOUND.smallest.stages[1] == ((5, 3), (5, 3))
    assert ELASTIC.largest.stages == (((7, 6),) * 4,) * 5
    assert FREE.smallest.stages == (((3, 3),) * 2,) * 5
    resolutions = SPACES["resolutions"]
    assert (resolutions.smallest.resolution, resolutions.largest.resolution) == (160, 192)


# --- membership ---


def change(subnet: Subnet, stage: int, *blocks: tuple) -> Subnet:
    stages = list(subnet.stages)
    stages[stage] = blocks
    return replace(subnet, stages=tuple(stages))


def test_members_have_no_faults() -> None:
    for space in SPACES.values():
        assert space.faults(space.sample(rng(11))) == []
        space.require(space.sample(rng(11)))


def test_faults_list_every_fault() -> None:
    subnet = change(COMPOUND.largest.at(225), 0, *((3, 6),) * 3)
    subnet = change(subnet, 2, (3, 6))
    subnet = change(subnet, 4, (7, 6), (5, 5), (5, 6), (5, 6))
    assert COMPOUND.faults(subnet) == [
        "resolution: expected 224, got 225",
        *(
            f"stage 1 block {block} expand (coupled with depth 3): expected 4, got 6"
            for block in (1, 2, 3)
        ),
        "stage 3 depth: expected 2 or 3 or 4, got 1",
        "stage 5 block 1 kernel: expected 5, got 7",
        "stage 5 block 2 expand: expected 3 or 4 or 6, got 5",
    ]
    assert "resolution" not in "".join(COMPOUND.faults(subnet, resolution=False))
    assert not COMPOUND.contains(subnet)


def test_the_error_tells_every_fault_in_one_line() -> None:
    subnet = Subnet(99, (((9, 5),) * 4,) * 5)
    with pytest.raises(SpaceError) as caught:
        COMPOUND.encode(subnet)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert "resolution: expected 224, got 99" in message
    assert "and 16 more: expected 3 or 4 or 6, got 5" in message
    for kernel in (3, 5):  # what stages expect differs: a clause each
        assert f"expected {kernel}, got 9" in message


def test_another_number_of_stages_is_a_fault() -> None:
    subnet = Subnet(224, COMPOUND.largest.stages[:4])
    assert COMPOUND.faults(subnet) == ["stages: expected 5, got 4"]


@pytest.mark.parametrize("expand", [float("nan"), None, "6", 5])
def test_strange_values_are_not_members(expand: object) -> None:
    assert not FREE.contains(change(FREE.largest, 0, *((3, expand),) * 4))


def test_an_own_coupling_makes_a_space() -> None:
    assert OWN.smallest.stages[0] == ((3, 2.5),)
    assert OWN.largest.stages[0] == ((7, 4),) * 3
    assert OWN.slots == 3
    assert OWN.decode(OWN.encode(OWN.smallest)) == OWN.smallest


def test_a_code_has_no_gene_for_a_choice_of_one() -> None:
    assert len(COMPOUND.genes) == 5 + 1
    assert len(ELASTIC.genes) == 5 * (1 + 4) + 1
    assert len(FREE.genes) == 5 * (1 + 8) + 1
    assert GeneCode.of(FREE.stages[:1], 4, (224,)).cardinalities.tolist() == [3] * 9 + [1]
