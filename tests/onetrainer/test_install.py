"""Installing and uninstalling the add-on, in a stand-in and in a real checkout if there is one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path, PureWindowsPath

import pytest
from support.interrupted import leave_interrupted
from support.onetrainer_stub import write_checkout, write_packages

from onewan.cli import main
from onewan.onetrainer.environment import imported_names, python_in
from onewan.onetrainer.install import MANIFEST, InstallError, install, overlay, status, uninstall

linked = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


def git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "OneTrainer"
    root.mkdir()
    write_checkout(root)
    (root / "training_presets").mkdir()
    (root / "training_presets" / "#other.json").write_text("{}", "utf-8")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "as it is")
    return root


def tree(root: Path) -> dict[str, str]:
    return {
        p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*")
        if p.is_file() and ".git" not in p.relative_to(root).parts
    }


def folders(root: Path) -> set[str]:
    return {
        p.relative_to(root).as_posix()
        for p in root.rglob("*")
        if p.is_dir() and ".git" not in p.relative_to(root).parts
    }


def test_installing_twice_and_uninstalling_leaves_the_checkout_as_it_was(checkout: Path):
    before, dirs = tree(checkout), folders(checkout)
    assert main(["onetrainer", "install", str(checkout)]) == 0
    once = tree(checkout)
    assert set(once) - set(before) == {*overlay(), MANIFEST}
    assert all(
        line.startswith("??") for line in git(checkout, "status", "--porcelain").splitlines()
    )
    assert main(["onetrainer", "status", str(checkout)]) == 0
    assert main(["onetrainer", "install", str(checkout)]) == 0
    assert tree(checkout) == once
    # What Python leaves behind of our files goes too; of others it stays.
    cache = checkout / "modules/modelSampler/__pycache__"
    cache.mkdir()
    (cache / "WanSampler.cpython-311.pyc").write_bytes(b"x")
    (cache / "Other.cpython-311.pyc").write_bytes(b"x")
    assert main(["onetrainer", "uninstall", str(checkout)]) == 0
    assert sorted(p.name for p in cache.iterdir()) == ["Other.cpython-311.pyc"]
    (cache / "Other.cpython-311.pyc").unlink()
    cache.rmdir()
    assert git(checkout, "status", "--porcelain") == ""
    assert tree(checkout) == before and folders(checkout) == dirs
    assert main(["onetrainer", "uninstall", str(checkout)]) == 1
    assert main(["onetrainer", "status", str(checkout)]) == 1


def test_a_real_checkout_is_as_before_after_uninstalling(real_checkout: Path, tmp_path: Path):
    copy = tmp_path / "OneTrainer"
    subprocess.run(["git", "clone", "-q", str(real_checkout), str(copy)], check=True)
    before = tree(copy)
    install(copy)
    assert all(line.startswith("??") for line in git(copy, "status", "--porcelain").splitlines())
    assert status(copy).complete and status(copy).current
    uninstall(copy)
    assert git(copy, "status", "--porcelain", "--ignored") == "" and tree(copy) == before


def test_a_checkout_without_a_needed_name_is_refused_untouched(checkout: Path):
    write_checkout(
        checkout, only="modules.util.enum.ModelType", rename=["ModelType.is_video_model"]
    )
    before = tree(checkout)
    with pytest.raises(InstallError, match=r"ModelType\.is_video_model: is not there"):
        install(checkout)
    assert tree(checkout) == before


def test_a_folder_that_is_not_a_checkout_is_refused(tmp_path: Path, capsys):
    assert main(["onetrainer", "install", str(tmp_path)]) == 1
    assert "is not a OneTrainer checkout" in capsys.readouterr().err


def test_other_files_at_the_addons_paths_are_not_overwritten(checkout: Path):
    path = checkout / "modules/model/WanModel.py"
    path.write_text("theirs", "utf-8")
    before = tree(checkout)
    with pytest.raises(InstallError, match=r"modules/model/WanModel\.py"):
        install(checkout)
    assert tree(checkout) == before


def test_changed_files_are_kept_unless_forced(checkout: Path, capsys):
    before = set(tree(checkout))
    install(checkout)
    path = checkout / "modules/modelSetup/wan/BaseWanSetup.py"
    path.write_text("mine", "utf-8")
    found = status(checkout)
    assert found.changed == ("modules/modelSetup/wan/BaseWanSetup.py",)
    assert install(checkout).kept == found.changed and path.read_text("utf-8") == "mine"
    assert main(["onetrainer", "uninstall", str(checkout)]) == 1
    assert "kept, because it was changed" in capsys.readouterr().out and path.exists()
    # The manifest stays for it, and so does what --force means.
    assert set(tree(checkout)) - before == {MANIFEST, *found.changed}
    again = status(checkout)
    assert again.installed and not again.complete and again.changed == found.changed
    assert install(checkout).kept == found.changed and path.read_text("utf-8") == "mine"
    assert install(checkout, force=True).written == found.changed and status(checkout).current
    path.write_text("mine", "utf-8")
    assert uninstall(checkout).kept == found.changed
    uninstall(checkout, force=True)
    assert git(checkout, "status", "--porcelain") == ""


def test_uninstalling_completes_after_a_changed_file_is_deleted(checkout: Path):
    dirs = folders(checkout)
    install(checkout)
    path = checkout / "modules/modelSetup/wan/BaseWanSetup.py"
    path.write_text("mine", "utf-8")
    uninstall(checkout)
    path.unlink()
    assert uninstall(checkout).kept == ()
    assert git(checkout, "status", "--porcelain") == "" and folders(checkout) == dirs


def test_without_a_manifest_the_files_of_this_version_can_still_be_removed(checkout: Path):
    dirs = folders(checkout)
    install(checkout)
    (checkout / MANIFEST).unlink()
    path = checkout / "modules/modelSetup/wan/BaseWanSetup.py"
    path.write_text("mine", "utf-8")
    assert uninstall(checkout).kept == ("modules/modelSetup/wan/BaseWanSetup.py",)
    assert path.read_text("utf-8") == "mine"
    uninstall(checkout, force=True)
    assert git(checkout, "status", "--porcelain") == "" and folders(checkout) == dirs
    path.parent.mkdir()
    path.write_text("theirs", "utf-8")
    with pytest.raises(InstallError, match="is not installed"):
        uninstall(checkout, force=True)
    assert path.read_text("utf-8") == "theirs"


def test_a_newer_version_replaces_the_old_one(checkout: Path):
    files = overlay()
    old = dict(files)
    old["modules/model/WanModel.py"] = b"# old\n"
    old["modules/model/WanGone.py"] = b"# gone since\n"
    install(checkout, contents=old)
    assert not status(checkout).current
    outcome = install(checkout)
    assert outcome.written == ("modules/model/WanModel.py",)
    assert outcome.removed == ("modules/model/WanGone.py",)
    assert status(checkout).current
    uninstall(checkout)
    assert git(checkout, "status", "--porcelain") == ""


def test_an_interrupted_installation_can_be_completed_or_removed(checkout: Path, monkeypatch):
    import onewan.onetrainer.install as module

    real, count = module.replacing, iter(range(100))

    def cut(path):
        if next(count) == 5:
            raise KeyboardInterrupt
        return real(path)

    monkeypatch.setattr(module, "replacing", cut)
    with pytest.raises(KeyboardInterrupt):
        install(checkout)
    monkeypatch.setattr(module, "replacing", real)
    found = status(checkout)
    assert found.installed and not found.complete and found.missing
    uninstall(checkout)
    assert git(checkout, "status", "--porcelain") == ""
    count = iter(range(100))
    monkeypatch.setattr(module, "replacing", cut)
    with pytest.raises(KeyboardInterrupt):
        install(checkout)
    monkeypatch.setattr(module, "replacing", real)
    install(checkout)
    assert status(checkout).complete and not status(checkout).missing


def test_an_interrupted_update_recognizes_the_old_files(checkout: Path, monkeypatch):
    """They are not reported as changed and not kept."""
    import onewan.onetrainer.install as module

    old = {name: b"# version 1\n" + data for name, data in overlay().items()}
    install(checkout, contents=old)
    real, count = module.replacing, iter(range(100))

    def cut(path):
        if next(count) == 5:
            raise KeyboardInterrupt
        return real(path)

    for middle in ({n: b"# version 2\n" + d for n, d in overlay().items()}, overlay()):
        count = iter(range(100))
        monkeypatch.setattr(module, "replacing", cut)
        with pytest.raises(KeyboardInterrupt):
            install(checkout, contents=middle)
        monkeypatch.setattr(module, "replacing", real)
        found = status(checkout)
        assert not found.complete and not found.changed and not found.missing
    outcome = install(checkout)
    assert not outcome.kept and status(checkout).current and status(checkout).complete
    assert "replaced" not in json.loads((checkout / MANIFEST).read_text("utf-8"))
    install(checkout, contents=old)
    monkeypatch.setattr(module, "replacing", cut)
    count = iter(range(100))
    with pytest.raises(KeyboardInterrupt):
        install(checkout)
    monkeypatch.setattr(module, "replacing", real)
    assert not uninstall(checkout).kept
    assert git(checkout, "status", "--porcelain") == ""


def test_a_killed_process_leaves_no_temporary_files_behind(checkout: Path):
    dirs = folders(checkout)
    install(checkout)
    leave_interrupted(
        checkout / MANIFEST,
        checkout / "modules/model/WanModel.py",
        checkout / "modules/modelSetup/wan/BaseWanSetup.py",
    )
    path = checkout / "modules/model/WanModel.py"
    path.unlink()
    install(checkout)
    assert not list(path.parent.glob(".tmp-*"))
    uninstall(checkout)
    assert git(checkout, "status", "--porcelain") == "" and folders(checkout) == dirs


def test_a_changed_file_that_the_new_version_does_not_have_is_kept_and_reported(checkout: Path):
    laid = {**overlay(), "modules/model/WanGone.py": b"# gone since\n"}
    install(checkout, contents=laid)
    path = checkout / "modules/model/WanGone.py"
    path.write_text("mine", "utf-8")
    assert install(checkout).kept == ("modules/model/WanGone.py",)
    assert path.read_text("utf-8") == "mine" and status(checkout).current
    assert install(checkout).kept == ()
    path.unlink()
    install(checkout, contents=laid)
    path.write_text("mine", "utf-8")
    assert install(checkout, force=True).removed == ("modules/model/WanGone.py",)
    assert not path.exists()


@linked
def test_symbolic_links_out_of_the_checkout_are_not_followed(checkout: Path, tmp_path: Path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (checkout / "modules" / "modelSetup" / "wan").symlink_to(elsewhere)
    with pytest.raises(InstallError, match="lead out of the checkout"):
        install(checkout)
    assert not list(elsewhere.iterdir()) and not (checkout / MANIFEST).exists()
    (checkout / "modules" / "modelSetup" / "wan").unlink()
    path = checkout / "modules/model/WanModel.py"
    path.symlink_to(elsewhere / "nothing.py")
    with pytest.raises(InstallError, match="WanModel"):
        install(checkout)
    path.unlink()
    install(checkout)
    (elsewhere / "WanModel.py").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere / "WanModel.py")
    assert status(checkout).changed == ("modules/model/WanModel.py",)
    assert uninstall(checkout).kept == ("modules/model/WanModel.py",)
    cache = checkout / "modules/model/__pycache__"
    cache.symlink_to(elsewhere)
    (elsewhere / "WanModel.cpython-311.pyc").write_bytes(b"x")
    uninstall(checkout, force=True)
    assert not path.is_symlink() and len(list(elsewhere.iterdir())) == 2


def test_a_write_error_is_one_line_and_the_installation_can_be_repeated(
    checkout: Path, monkeypatch, capsys
):
    import onewan.onetrainer.install as module

    real = module.replacing

    def denied(path):
        if path.name == "WanModel.py":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(module, "replacing", denied)
    assert main(["onetrainer", "install", str(checkout)]) == 1
    said = capsys.readouterr().err
    assert "WanModel.py: Permission denied" in said and said.count("\n") == 1
    monkeypatch.setattr(module, "replacing", real)
    assert main(["onetrainer", "install", str(checkout)]) == 0 and status(checkout).complete


def test_names_in_the_manifest_have_forward_slashes(checkout: Path):
    install(checkout)
    manifest = json.loads((checkout / MANIFEST).read_text("utf-8"))
    for name in (*manifest["files"], *manifest["folders"]):
        assert "\\" not in name and not PureWindowsPath(name).drive
        assert PureWindowsPath(name).as_posix() == name


@pytest.mark.parametrize(
    "name", ["../victim.txt", "/tmp/victim.txt", "C:\\x", "link/victim.txt", ".git/HEAD", ""]
)
def test_a_manifest_with_paths_outside_the_checkout_deletes_nothing(
    checkout: Path, tmp_path: Path, name: str
):
    victim = tmp_path / "victim.txt"
    victim.write_text("mine", "utf-8")
    (checkout / "link").symlink_to(tmp_path)
    install(checkout)
    manifest = json.loads((checkout / MANIFEST).read_text("utf-8"))
    manifest["files"][name] = hashlib.sha256(b"mine").hexdigest()
    (checkout / MANIFEST).write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(InstallError, match="not in the checkout"):
        uninstall(checkout)
    assert victim.exists()


def test_a_damaged_manifest_is_reported_in_one_line(checkout: Path, capsys):
    install(checkout)
    (checkout / MANIFEST).write_text("{", "utf-8")
    assert main(["onetrainer", "uninstall", str(checkout)]) == 1
    assert MANIFEST in capsys.readouterr().err


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="needs a user whom permissions bind"
)
def test_a_folder_without_write_permission_is_an_install_error(checkout: Path):
    os.chmod(checkout / "modules", 0o500)
    try:
        with pytest.raises(InstallError):
            install(checkout)
    finally:
        os.chmod(checkout / "modules", 0o700)


@pytest.fixture
def packages(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of installed packages of an environment in the checkout, with none in it."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    venv.create(checkout / "venv", symlinks=os.name != "nt")
    (packages,) = (*checkout.glob("venv/lib/python*/site-packages"), *checkout.glob("venv/Lib/*"))
    return packages


@pytest.mark.usefixtures("packages")
def test_an_environment_without_onewan_is_reported(checkout: Path, capsys):
    assert main(["onetrainer", "install", str(checkout)]) == 0
    said = capsys.readouterr().out
    assert f"it has no onewan: {python_in(checkout)} -m pip install onewan" in said
    assert said.count("not available") == 1
    assert main(["onetrainer", "status", str(checkout)]) == 1
    assert "-m pip install onewan" in capsys.readouterr().out


def test_status_imports_in_the_environment_what_the_addon_imports(
    checkout: Path, packages: Path, capsys
):
    """Stands for an update of OneTrainer that brings a package which lacks a name."""
    for module, names in imported_names().items():
        if module.partition(".")[0] not in {*sys.stdlib_module_names, "mgds"}:
            folder = packages.joinpath(*module.split("."))
            folder.mkdir(parents=True, exist_ok=True)
            text = "".join(f"{name} = None\n" for name in names)
            (folder / "__init__.py").write_text(text, "utf-8")
    write_packages(packages)
    (packages / "av-16.1.0.dist-info").mkdir()
    metadata = packages / "av-16.1.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: av\nVersion: 16.1.0\n", "utf-8")
    media = packages / "onewan" / "media" / "__init__.py"
    media.write_text("from os import ColorPrimaries\n", "utf-8")
    install(checkout)
    assert main(["onetrainer", "status", str(checkout)]) == 1
    (line,) = [n for n in capsys.readouterr().out.splitlines() if "not available" in n]
    assert "ImportError: cannot import name 'ColorPrimaries'" in line and "onewan.media" in line
    media.write_text("write_video = None\n", "utf-8")
    pipeline = packages / "mgds" / "PipelineModule.py"
    whole = pipeline.read_text("utf-8")
    pipeline.write_text(whole.replace("class PipelineModule", "class Renamed"), "utf-8")
    assert main(["onetrainer", "status", str(checkout)]) == 1
    said = capsys.readouterr().out
    assert "not available there: ModuleNotFoundError: No module named 'mgds.PipelineModule" in said
    assert "mgds/PipelineModule.py: PipelineModule: is not there" in said and "av 16.1.0" in said
    pipeline.write_text(whole, "utf-8")
    assert main(["onetrainer", "status", str(checkout)]) == 0, capsys.readouterr().out


def test_an_environment_that_does_not_run_is_reported_in_one_line(checkout: Path, capsys):
    (checkout / "venv" / "bin").mkdir(parents=True)
    (checkout / "venv" / "bin" / "python").write_text("", "utf-8")
    install(checkout)
    assert main(["onetrainer", "status", str(checkout)]) == 1
    assert "not available there: it does not run: " in capsys.readouterr().out


# ------------------------------------------------------------- OneTrainer gets Wan 2.2 of its own


def upstream_gets_wan(checkout: Path, name: str = "modules/model/WanModel.py") -> None:
    """A commit of the checkout's own repository with a file at one of the add-on's paths."""
    (checkout / name).write_text("# OneTrainer's own\n", "utf-8")
    git(checkout, "add", "-f", name)
    git(checkout, "commit", "-qm", "Wan 2.2")


def test_a_onetrainer_with_its_own_model_type_is_refused(checkout: Path, capsys):
    path = checkout / "modules/util/enum/ModelType.py"
    text = path.read_text("utf-8")
    path.write_text(text.replace("HUNYUAN_VIDEO =", "WAN_2_2 = HUNYUAN_VIDEO ="), "utf-8")
    before = tree(checkout)
    assert main(["onetrainer", "check", str(checkout)]) == 1
    said = capsys.readouterr().out
    assert "ModelType.WAN_2_2: OneTrainer has Wan 2.2 itself" in said and "uninstall" in said
    with pytest.raises(InstallError, match=r"has Wan 2\.2 itself"):
        install(checkout, force=True)
    assert tree(checkout) == before


def test_a_file_of_onetrainers_own_at_our_path_is_never_touched(checkout: Path, capsys):
    upstream_gets_wan(checkout)
    before = tree(checkout)
    assert main(["onetrainer", "check", str(checkout)]) == 1
    assert "modules/model/WanModel.py: is a file of OneTrainer's" in capsys.readouterr().out
    for force in (False, True):
        with pytest.raises(InstallError, match=r"has files of its own .*WanModel"):
            install(checkout, force=force)
    assert tree(checkout) == before


def test_the_addon_can_be_left_after_onetrainer_has_taken_over_a_path(checkout: Path, capsys):
    before = tree(checkout)
    install(checkout)
    upstream_gets_wan(checkout)  # as after `git checkout --force`
    assert status(checkout).taken == ("modules/model/WanModel.py",)
    assert main(["onetrainer", "status", str(checkout)]) == 1
    with pytest.raises(InstallError, match="has files of its own"):
        install(checkout, force=True)
    capsys.readouterr()
    assert main(["onetrainer", "uninstall", str(checkout), "--force"]) == 0
    assert "OneTrainer's own file by now: modules/model/WanModel.py" in capsys.readouterr().out
    left = tree(checkout)
    assert left.keys() - before.keys() == {"modules/model/WanModel.py"}
    assert git(checkout, "status", "--porcelain") == ""
