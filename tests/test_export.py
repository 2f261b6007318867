"""Exports of kernels, as Hugging Face's package `kernels` reads and loads them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gnaforge.build_tools.cuda import find_nvcc
from gnaforge.errors import GnaforgeError, InputError
from gnaforge.plan import Plan
from gnaforge.wheel import build
from gnaforge.wheel.build import in_namespace
from gnaforge.wheel.hugging_face import Variant, export, kernel_name, namespace_of, variant_name
from kernel_set import SMALL
from sm90_kernels import CONFIGS

pytest.importorskip("kernels")
from kernels._rust import Digest, DigestAlgorithm, DigestValidationError, Metadata
from kernels.backends import CUDA
from kernels.variants import _resolve_variant_for_system, get_variants_local
from packaging.version import Version

REBUILD = "gnaforge export --hf my.yaml"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, session_cache: Path) -> tuple[Path, Variant]:
    folder = tmp_path_factory.mktemp("repository")
    (written,) = export(Plan("tests_of_export", (SMALL,)), folder, rebuild=REBUILD)
    return folder, written


def run(code: str, *arguments: str) -> list[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


LOAD = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
def load(): return get_local_kernel(Path(sys.argv[1]), backend="cpu", trust_remote_code=True)
q = torch.randn(2, 37, 3, 16)
def operators(): return {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}
"""


def test_it_is_loaded_and_computes(repository: tuple[Path, Variant]) -> None:
    """By the package itself; beside attention in float64, compiled, with gradients refused; in its own namespace."""
    folder, written = repository
    lines = run(
        LOAD + "before = operators()\n"
        "package = load()\n"
        "out = package.na1d(q, q, q, 7)\n"
        "print(package.__name__, operators() - before)\n"
        "start = (torch.arange(37) - 3).clamp(0, 30)[:, None]\n"
        "mask = (torch.arange(37) >= start) & (torch.arange(37) < start + 7)\n"
        "x = q.double().transpose(1, 2)\n"
        "want = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask).transpose(1, 2)\n"
        "print(float((out - want).abs().max()) < 1e-5)\n"
        "compiled = torch.compile(lambda q: package.na1d(q, q, q, 7), fullgraph=True, backend='aot_eager')\n"
        "print(torch.equal(compiled(q), out))\n"
        "print([kernel.key for kernel in package.kernels()], 'runs here' in package.report())\n"
        "print('gnaforge' in sys.modules)\n"
        "try: package.na2d(*[torch.randn(1, 6, 6, 2, 8)] * 3, 3)\n"
        "except package.NoKernelError as error: print(error)\n",
        str(folder),
    )
    assert lines[0] == f"{written.namespace} {{'{written.namespace}'}}"
    assert lines[1:3] == ["True", "True"]
    assert lines[3] == f"['{SMALL.key}'] True"
    assert lines[4] == "False"
    assert any(line.endswith(f"and write the export again: {REBUILD}") for line in lines[5:])


@pytest.mark.parametrize("first", ["gnaforge", "export"])
def test_it_goes_with_gnaforge_in_one_process(repository: tuple[Path, Variant], first: str) -> None:
    """Whichever comes first: two cores and two tables, of which each sees its own kernels."""
    folder, _ = repository
    loads = [f"import gnaforge; gnaforge.register({SMALL.key!r}); a = gnaforge.na1d(q, q, q, 7)\n"]
    loads.insert(int(first == "gnaforge"), "package = load(); b = package.na1d(q, q, q, 7)\n")
    lines = run(
        LOAD + "".join(loads) + "print(torch.equal(a, b), {'gnaforge', package.__name__} <= operators())\n"
        "origins = [one.registry[package.kernels()[0].key].origin for one in (gnaforge, package)]\n"
        "print(origins[0] != origins[1], Path(sys.argv[1]) in Path(origins[1]).parents)\n",
        str(folder),
    )
    assert lines == ["True True", "True True"]


def test_its_metadata_is_what_the_package_reads(repository: tuple[Path, Variant], tmp_path: Path) -> None:
    folder, written = repository
    assert written.folder == folder / "build" / variant_name("cpu", None)
    metadata = Metadata.read_from_file(written.folder / "metadata.json")
    assert (metadata.id, str(metadata.name), metadata.version) == (written.namespace, "gnaforge-tests-of-export", 1)
    assert metadata.license == "MIT AND BSD-3-Clause" and metadata.python_depends == []
    hashed = Digest.hash_variant(DigestAlgorithm.SHA256, written.folder)
    metadata.digest.validate(hashed)
    assert "kernels.so" in metadata.digest.files and "licenses/gnaforge.txt" in metadata.digest.files
    copy = tmp_path / "copy"
    shutil.copytree(written.folder, copy)
    (copy / "__init__.py").write_text("")
    with pytest.raises(DigestValidationError):
        metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, copy))
    assert json.loads((written.folder / "gnaforge.json").read_text())["rebuild"] == REBUILD


def test_a_second_export_replaces_the_first(repository: tuple[Path, Variant]) -> None:
    folder, written = repository

    def read() -> dict[Path, bytes]:  # but for what Python adds where the package is imported
        found = (path for path in written.folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
        return {path: path.read_bytes() for path in found}

    files = read()
    (written.folder / "left over").touch()
    (again,) = export(Plan("tests_of_export", (SMALL,)), folder, rebuild=REBUILD)
    assert again.folder == written.folder and read() == files
    assert again.namespace == written.namespace and again.compiled == []


def test_what_is_refused(tmp_path: Path) -> None:
    plan = Plan("tests_of_export", (SMALL,))
    for name in ("Upper", "ends-", "1st", "under_score", "a"):
        with pytest.raises(InputError, match=f"--name '{name}': two characters or more, lower-case letters, digits"):
            export(plan, tmp_path, rebuild=REBUILD, name=name)
    with pytest.raises(InputError, match="'gnaforge-ends-', after the library, is no name of a kernel, give --name"):
        export(replace(plan, library="ends_"), tmp_path, rebuild=REBUILD)
    with pytest.raises(InputError, match="--version 0: give a whole number"):
        export(plan, tmp_path, rebuild=REBUILD, version=0)
    foreign = tmp_path / "build" / variant_name("cpu", None)
    foreign.mkdir(parents=True)
    (foreign / "precious").touch()
    with pytest.raises(InputError, match="gnaforge didn't write it"):
        export(plan, tmp_path, rebuild=REBUILD)
    assert (foreign / "precious").exists()


def _accepts(name: str, folder: Path, like: Path) -> bool:
    metadata = folder / "metadata.json"
    metadata.write_text(json.dumps(json.loads((like / "metadata.json").read_text()) | {"name": name}))
    try:
        Metadata.read_from_file(metadata)
    except ValueError:
        return False
    return True


def test_names_are_those_that_the_package_takes(repository: tuple[Path, Variant], tmp_path: Path) -> None:
    for name in ("a", "ab", "a1", "a--b", "a-", "-a", "1a", "A", "aB", "a_b", "\u00e4b", "ab\n", "a b"):
        try:
            ours = kernel_name("library", name) == name
        except InputError:
            ours = False
        assert ours == _accepts(name, tmp_path, repository[1].folder), name
    assert kernel_name("MyLib_2", None) == "gnaforge-mylib-2"
    assert _accepts(kernel_name("MyLib_2", None), tmp_path, repository[1].folder)


def test_a_namespace_is_named_after_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two exports that differ in any of it, Python code alone too, share no operators in a process."""
    own = namespace_of("name", 1, "cpu", {"kernels": ["k"]})
    assert own == namespace_of("name", 1, "cpu", {"kernels": ["k"]})
    others = [namespace_of("name", 2, "cpu", {"kernels": ["k"]}), namespace_of("name", 1, "cpu", {"kernels": ["l"]})]
    files = build._runtime_files()
    changed = tmp_path / files[0].name
    changed.write_bytes(files[0].read_bytes() + b"# changed\n")
    monkeypatch.setattr(build, "_runtime_files", lambda: [changed, *files[1:]])
    others.append(namespace_of("name", 1, "cpu", {"kernels": ["k"]}))
    assert len({own, *others}) == 4


def test_names_in_a_namespace() -> None:
    source = 'torch.ops.gnaforge.forward; f"gnaforge::{name}"; Library("gnaforge", "IMPL"); f"_gnaforge_process_v{x}"'
    kept = ' "gnaforge_entry_"; import gnaforge; "built by gnaforge"'
    assert in_namespace(source + kept, "own").decode() == source.replace("gnaforge", "own") + kept


def test_a_variant_for_gpus(repository: tuple[Path, Variant], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One repository has both; the package takes each where its backend is.

    Nothing is loaded here, so the CPU's core goes into both: to compile one more takes 10 seconds.
    """
    try:
        find_nvcc()
    except GnaforgeError:
        pytest.skip("needs a CUDA compiler")
    config = CONFIGS[2]
    core = build.core_object(repository[1].namespace)
    monkeypatch.setattr(build, "core_object", lambda namespace: core)
    cpu, cuda = export(Plan("tests_of_export", (SMALL, config)), tmp_path, rebuild=REBUILD)
    assert cpu.folder.name == repository[1].folder.name and cpu.kernels == (SMALL,)
    assert cuda.kernels == (config,) and cuda.namespace != cpu.namespace
    metadata = Metadata.read_from_file(cuda.folder / "metadata.json")
    assert metadata.backend.archs == ["9.0a"] and str(metadata.backend.backend_type) == "cuda"
    facts = json.loads((cuda.folder / "gnaforge.json").read_text())
    assert cuda.folder.name == variant_name("cuda", facts["cuda_runtime"])
    machine = cuda.folder.name.split("-")[-2]
    system = {"cpu": machine, "os": "linux", "torch_cxx11_abi": True, "tvm_ffi_version": None}
    for version, taken in (("2.9", []), ("2.10", [cuda.folder.name]), ("2.13", [cuda.folder.name])):
        found, _ = _resolve_variant_for_system(
            get_variants_local(tmp_path / "build"), CUDA(Version("13.0")), torch_version=Version(version), **system
        )
        assert [variant.variant_str for variant in found] == taken
