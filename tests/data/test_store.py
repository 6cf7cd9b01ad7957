import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechdiff.data import manifest
from mechdiff.data.manifest import SCHEMA, Contents, StoreIdentity, checksum, write_json
from mechdiff.data.store import POSITIONS, ActivationStore, decode, encode
from mechdiff.errors import StoreError
from mechdiff.extraction.extractor import ensure_store
from mechdiff.extraction.spec import ExtractionSpec
from mechdiff.interventions.sites import Site
from tests.toys import PLAIN, loaded, prompts

QUIET = {"enable_progress_bar": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("stores")
    spec = ExtractionSpec(str(root), tokens_per_batch=256, batches_per_shard=2)
    for sites in (["resid_post.1", "mlp_out.0"], ["resid_post.2"]):  # two passes
        ensure_store(loaded(), prompts(), sites, spec, trainer_kwargs=QUIET)
    return root


@pytest.fixture(scope="module")
def store(root) -> ActivationStore:
    return ActivationStore.open(next(iter(root.iterdir())))


@pytest.fixture
def copy(root, tmp_path) -> Path:
    """Return a copy of the store's folder, to be broken."""
    source = next(iter(root.iterdir()))
    return Path(shutil.copytree(source, tmp_path / source.name))


def test_rows_in_any_order(store):
    whole = store.read("resid_post.2")
    assert whole.shape == (len(store), 32)
    assert whole.dtype == torch.float32
    assert len(store) > 1000  # several shards, and gaps wider than what is read through
    for seed in range(5):
        rows = torch.randint(len(store), (200,), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(store.read("resid_post.2", rows), whole[rows])
    ends = torch.tensor([len(store) - 1, 0, 0])
    assert torch.equal(store.read(Site(2), ends), whole[ends])
    assert store.read(Site(2), torch.tensor([], dtype=torch.long)).shape == (0, 32)
    with pytest.raises(AssertionError):
        store.read(Site(2), torch.tensor([len(store)]))


def test_sites_of_several_passes_are_read_together(store):
    rows, names = torch.tensor([7, 0, len(store) - 1, 7]), ["resid_post.2", "mlp_out.0", "resid_post.1"]
    found = store.read_sites(names, rows)
    assert list(found) == names
    assert all(torch.equal(found[name], store.read(name)[rows]) for name in names)
    assert list(store.read_sites([Site(2)])) == [Site(2)]
    with pytest.raises(StoreError, match=r"does not hold site resid_post\.0"):
        store.read_sites(["resid_post.2", "resid_post.0"], rows)


def test_rows_are_those_that_h5py_reads(store):
    part = store._pass("mlp_out.0")
    shards = []
    for shard in part.shards:
        with h5py.File(part.folder / shard.file) as file:
            shards.append(torch.from_numpy(file["sites/mlp_out.0"][:]))
    assert len(shards) > 1
    whole = torch.cat(shards)
    runs = torch.cat([torch.arange(start, start + 7) for start in range(0, len(store) - 7, 11)])
    for rows in (None, runs, runs.flip(0), runs[::3], runs.repeat(2)):
        assert torch.equal(store.read("mlp_out.0", rows), whole if rows is None else whole[rows])


def test_a_shard_that_was_cut_after_it_was_opened(copy):
    store, path = ActivationStore.open(copy), shard(copy)
    with h5py.File(path) as file:  # the site whose rows are the last bytes of the file
        last = max(file["sites"], key=lambda name: file[f"sites/{name}"].id.get_offset())
    for site in store.sites:
        store.read(site)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(StoreError, match=f"{path.name} is damaged: its checksum has changed"):
        store.read(last)


def test_blocks_are_the_whole(store):
    blocks = list(store.blocks("mlp_out.0", 100))
    assert {len(block) for block in blocks[:-1]} == {100}
    assert torch.equal(torch.cat(blocks), store.read("mlp_out.0"))


def test_what_it_knows(store):
    assert store.sites == [Site(0, "mlp_out"), Site(1), Site(2)]
    assert [e.id for e in store.examples] == [p.id for p in prompts()]
    assert store.width("mlp_out.0") == 32
    assert store.prefix == [b"<|user|>"]
    assert b"".join(store.suffix) == b"<|end|>\n<|bot|>answer\n"
    with pytest.raises(
        StoreError, match=r"does not hold site resid_post.3; it holds .*mlp_out.0.*data.sites"
    ):
        store.read("resid_post.3")


def test_groups(store):
    example, region, offset, _ = store.rows
    names = [POSITIONS[g] for g in store.groups]
    assert names.count("last") == len(prompts())
    assert names.count("template") == len(prompts()) * (len(store.suffix) - 1)
    for name, r, o in zip(names, region.tolist(), offset.tolist(), strict=True):
        assert name == ("user" if r == 1 else "last" if o == -1 else "template")
    texts = [len(p.text.encode()) for p in prompts()]
    for index, size in enumerate(texts):  # the last token of the text ends where the text does
        assert offset[(example == index) & (region == 1)].max() == size


def test_without_a_template_the_end_of_the_text_is_last(tmp_path):
    store = ensure_store(
        loaded(template=None),
        prompts(),
        ["resid_post.0"],
        ExtractionSpec(str(tmp_path)),
        trainer_kwargs=QUIET,
    )
    last = (store.groups == POSITIONS.index("last")).nonzero().flatten()
    assert sorted(store.rows.example[last].tolist()) == list(range(len(prompts())))
    assert all(
        store.rows.offset[row] == len(prompts()[store.rows.example[row]].text.encode())
        for row in last.tolist()
    )


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=64))
def test_bfloat16_keeps_every_bit(bits):
    written = np.array(bits, dtype=np.uint16)
    values = torch.from_numpy(written.view(np.int16)).view(torch.bfloat16)
    number = ~values.isnan()  # which of the NaNs it is may change on the way
    again = encode(decode(written, "bfloat16"), "bfloat16")
    assert np.array_equal(again[number.numpy()], written[number.numpy()])
    assert torch.equal(decode(written, "bfloat16")[number], values.float()[number])


def test_float32_keeps_every_bit():
    values = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decode(encode(values, "float32"), "float32"), values)


def shard(folder: Path, number: int = 0) -> Path:
    return sorted(folder.glob("pass-*/*.h5"))[number]


def edit(path: Path, **change: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def swap(folder: Path) -> None:
    first, second = shard(folder, 0), shard(folder, 1)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def link(folder: Path) -> None:
    path = shard(folder)
    path.rename(folder.parent / "elsewhere.h5")
    path.symlink_to(folder.parent / "elsewhere.h5")


def link_pass(folder: Path) -> None:
    path = shard(folder).parent
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


def escape(folder: Path) -> None:
    manifest = shard(folder).parent / "manifest.json"
    shards = json.loads(manifest.read_text())["shards"]
    shards[0]["file"] = "../../" + shards[0]["file"]
    edit(manifest, shards=shards)


def widen(folder: Path, width: int) -> None:
    manifest = shard(folder).parent / "manifest.json"
    edit(manifest, sites=dict.fromkeys(json.loads(manifest.read_text())["sites"], width))


def other_run(folder: Path) -> None:
    manifest = shard(folder).parent / "manifest.json"
    shards = json.loads(manifest.read_text())["shards"]
    shards[0]["xxh3"] = "0" * 16
    edit(manifest, shards=shards)


def forge(folder: Path, change: Callable[[h5py.File], None]) -> None:
    """Change a shard, and have the manifest and the record vouch for it."""
    path = shard(folder)
    with h5py.File(path, "r+") as file:
        change(file)
    manifest = path.parent / "manifest.json"
    shards = json.loads(manifest.read_text())["shards"]
    shards[0]["xxh3"] = checksum(path)
    edit(manifest, shards=shards)
    edit(path.with_suffix(".json"), xxh3=checksum(path))


def replace_by(file: h5py.File, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    values = change(file[name][:])
    del file[name]
    file[name] = values


def virtual(file: h5py.File) -> None:
    """Put a column together from a file that is not there: HDF5 reads zeros."""
    layout = h5py.VirtualLayout(file["rows/example"].shape, np.int32)
    layout[:] = h5py.VirtualSource("gone.h5", "x", file["rows/example"].shape)
    del file["rows/example"]
    file.create_virtual_dataset("rows/example", layout, fillvalue=0)
    assert not file["rows/example"][:].any()


def external(file: h5py.File) -> None:
    """Have a column lie in another file."""
    shape = file["rows/example"].shape
    del file["rows/example"]
    elsewhere = [("gone.bin", 0, h5py.h5f.UNLIMITED)]
    file.create_dataset("rows/example", shape, np.int32, external=elsewhere)


def linked(file: h5py.File) -> None:
    """Link a column from a file beside it."""
    beside = Path(file.filename).with_name("beside.h5")
    with h5py.File(beside, "w") as other:
        other["x"] = file["rows/example"][:]
    del file["rows/example"]
    file["rows/example"] = h5py.ExternalLink(beside.name, "x")


def unwritten(file: h5py.File) -> None:
    """Have a column that nothing was ever written to: HDF5 reads zeros."""
    shape = file["rows/example"].shape
    del file["rows/example"]
    file.create_dataset("rows/example", shape, np.int32)
    assert not file["rows/example"][:].any()


def pieces(file: h5py.File) -> None:
    """Store a column in pieces, of which one is never written."""
    values = file["rows/example"][:]
    del file["rows/example"]
    file.create_dataset("rows/example", values.shape, np.int32, chunks=(8,))[8:] = values[8:]


BROKEN = {
    "no folder": (shutil.rmtree, r"cannot read .*manifest.json: No such file .*mechdiff extract"),
    "no shard": (lambda f: shard(f).unlink(), r"shard-00000.h5 is missing"),
    "short shard": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:500]),
        r"shard-00000.h5 is damaged",
    ),
    "empty shard": (lambda f: shard(f).write_bytes(b""), r"shard-00000.h5 is damaged"),
    "swapped shards": (swap, r"shard-00000.h5 is damaged"),
    "linked shard": (link, r"shard-00000.h5 is not a shard: allowed are regular files"),
    "linked pass": (link_pass, r"pass-\w+ is a symbolic link"),
    "path out of the folder": (escape, r"\.\./\.\./shard-00000.h5 is not a shard"),
    "no pass": (lambda f: [shutil.rmtree(p) for p in f.glob("pass-*")], r"holds no complete pass"),
    "not JSON": (lambda f: (f / "manifest.json").write_text("{"), r"manifest.json is not JSON"),
    "not an object": (
        lambda f: (f / "manifest.json").write_text("[]"),
        f"manifest.json is not of schema {SCHEMA}",
    ),
    "newer": (lambda f: edit(f / "manifest.json", schema=SCHEMA + 1), f"is not of schema {SCHEMA}"),
    "no identity": (lambda f: edit(f / "manifest.json", identity={}), r"is not the manifest of a store"),
    "odd examples": (
        lambda f: edit(f / "manifest.json", examples=[{"id": 1}]),
        r"not the manifest of a store",
    ),
    "odd template": (
        lambda f: edit(f / "manifest.json", template={"prefix": ["zz"], "suffix": []}),
        r"not the manifest of a store",
    ),
    "few examples": (
        lambda f: edit(f / "manifest.json", examples=[]),
        r"lists 0 examples; its rows name more",
    ),
    "pass of another store": (
        lambda f: edit(shard(f).parent / "manifest.json", key="0" * 16),
        r"manifest.json belongs to store 0{16}, not to",
    ),
    "pass without shards": (
        lambda f: edit(shard(f).parent / "manifest.json", shards=[]),
        r"is not the manifest of a pass: it names no shard",
    ),
    "pass of other sites": (
        lambda f: edit(shard(f).parent / "manifest.json", sites={"resid_post.3": 32}),
        r"manifest.json is that of another pass, pass-\w+; remove it",
    ),
    "pass of great width": (
        lambda f: widen(f, 2**30),
        r"pass-\w+/manifest.json says \d+ rows of \d+ numbers, more than shard-00000.h5 holds; remove it",
    ),
    "pass of a width beyond memory": (lambda f: widen(f, 2**62), "numbers, more than shard-00000.h5 holds"),
    "manifest of another run": (
        other_run,
        r"shard-00000.h5 is damaged: manifest.json is that of another run",
    ),
    "other rows": (
        lambda f: forge(f, lambda file: replace_by(file, "rows/offset", lambda old: old[:-1])),
        r"shard-00000.h5 does not hold rows/offset whole, as \(\d+,\) numbers",
    ),
    "virtual": (lambda f: forge(f, virtual), r"shard-00000.h5 does not hold rows/example whole"),
    "external": (lambda f: forge(f, external), r"shard-00000.h5 does not hold rows/example whole"),
    "linked": (lambda f: forge(f, linked), r"shard-00000.h5 does not hold rows/example whole"),
    "never written": (lambda f: forge(f, unwritten), r"shard-00000.h5 does not hold rows/example whole"),
    "in pieces": (lambda f: forge(f, pieces), r"shard-00000.h5 does not hold rows/example whole"),
    "odd site": (
        lambda f: edit(shard(f).parent / "manifest.json", sites={"x": 1}),
        r"is not the manifest of a pass: unknown site 'x'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named(copy, case):
    harm, message = BROKEN[case]
    harm(copy)
    with pytest.raises(StoreError, match=message) as caught:
        ActivationStore.open(copy)
    assert "\n" not in str(caught.value)


def test_a_file_is_read_for_its_checksum_once_and_again_after_a_change(copy, monkeypatch):
    for path in copy.rglob("*.h5"):
        os.utime(path, (0, 0))  # what has just been written is not trusted to show a change
    counted: list[Path] = []
    monkeypatch.setattr(manifest, "checksum", lambda path: counted.append(path) or checksum(path))
    store = ActivationStore.open(copy)
    assert sorted(counted) == sorted(copy.rglob("*.h5"))
    ActivationStore.open(copy)
    store.read("resid_post.1")
    assert len(counted) == len(list(copy.rglob("*.h5")))
    victim = shard(copy)
    content = victim.read_bytes()
    victim.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    os.utime(victim, (0, 0))  # the time of the change gives it away
    site = next(site for site in store.sites if store._pass(site).folder == victim.parent)
    with pytest.raises(StoreError, match=r"shard-00000.h5 is damaged"):
        store.read(site)


def test_passes_with_other_rows(copy, tmp_path):
    spec = ExtractionSpec(str(tmp_path / "other"))
    other = ensure_store(loaded(), prompts()[:-1], ["resid_post.3"], spec, trainer_kwargs=QUIET)
    part = next(other.folder.glob("pass-*"))
    moved = Path(shutil.copytree(part, copy / part.name))
    edit(moved / "manifest.json", key=copy.name)
    with pytest.raises(StoreError, match="hold different rows"):
        ActivationStore.open(copy)


def test_folder_can_move(copy, store):
    moved = copy.rename(copy.parent / "elsewhere")
    assert torch.equal(ActivationStore.open(moved).read(Site(1)), store.read(Site(1)))


def test_key_depends_on_every_field():
    plain = {name: name for name in StoreIdentity.__dataclass_fields__}
    keys = {StoreIdentity(**{**plain, name: "other"}).key for name in plain}
    assert len(keys | {StoreIdentity(**plain).key}) == len(plain) + 1
    assert all(len(key) == 16 and int(key, 16) >= 0 for key in keys)


def test_manifest_is_written_whole_or_not_at_all(tmp_path):
    path, contents = tmp_path / "manifest.json", Contents(StoreIdentity(*"abcdef"), [], [b"\xff"], [])
    contents.write(tmp_path)
    assert Contents.read(tmp_path) == contents
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert path.read_bytes() == before


def test_the_template_shows_in_the_key(root):
    other = PLAIN.replace("answer", "reply")
    spec = ExtractionSpec(str(root.parent / "third"))
    store = ensure_store(loaded(template=other), prompts(), ["resid_post.0"], spec, trainer_kwargs=QUIET)
    assert store.folder.name not in [path.name for path in root.iterdir()]
