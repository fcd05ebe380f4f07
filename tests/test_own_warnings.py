"""Of the warnings that are issued during a test, ours fail it and those of others do not."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import types
import warnings
from pathlib import Path

import own_warnings
import pytest
import torch

THEIRS = """
import warnings
import torch

def old():
    "Blames itself, as warnings do by default."
    warnings.warn("old is deprecated", FutureWarning)

def polite():
    "Blames its caller."
    warnings.warn("polite is deprecated", DeprecationWarning, stacklevel=2)

def renamed(function):
    def wrapper(*args, **kwargs):
        if "name" in kwargs:
            warnings.warn("name is deprecated", FutureWarning, stacklevel=2)
        return function(*args, **kwargs)
    return wrapper

class Old:
    def __init__(self):
        self.__post_init__()
    def __post_init__(self):
        warnings.warn("Old is deprecated", FutureWarning)

class Layer(torch.nn.Module):
    @renamed
    def forward(self, x=None, name=None):
        return x

def odd():
    warnings.warn("this looks odd", UserWarning)

def calls_old():
    old()
    polite()
    Old()
    Layer()(name=1)
"""


@pytest.fixture(scope="module")
def library():
    """A module of another library."""
    module = types.ModuleType("theirs")
    file = "/somewhere/site-packages/theirs.py"
    exec(compile(THEIRS, file, "exec"), module.__dict__)
    return module


def test_warnings_of_our_own_fail():
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn("ours", stacklevel=1)
    with pytest.raises(FutureWarning, match="ours"):
        warnings.warn("ours", FutureWarning, stacklevel=1)


def test_deprecations_that_we_cause_fail(library):
    with pytest.raises(FutureWarning, match="old is"):
        library.old()
    with pytest.raises(DeprecationWarning, match="polite is"):
        library.polite()
    with pytest.raises(FutureWarning, match="Old is"):
        library.Old()
    with pytest.raises(FutureWarning, match="name is"):  # blamed on torch, which calls forward
        library.Layer()(name=1)


def test_what_others_warn_about_each_other_does_not_fail(library):
    library.calls_old()
    library.odd()


def test_a_class_of_another_library_over_a_deprecated_one_is_theirs(library):
    other = types.ModuleType("other")
    other.Old = library.Old
    code = "class Over(Old):\n    def __post_init__(self):\n        super().__post_init__()\n"
    exec(compile(code, "/somewhere/site-packages/other/mod.py", "exec"), other.__dict__)
    other.Over()


def test_they_can_still_be_seen_and_asked_for(library):
    with pytest.warns(FutureWarning, match="old is"):
        library.old()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="odd"):
            library.odd()


def test_the_folders_of_the_repository_are_ours():
    import fastpref

    for file in (fastpref.__file__, __file__, own_warnings.ROOT / "examples" / "x.py"):
        assert own_warnings.is_ours(str(file))
    for file in (torch.__file__, own_warnings.ROOT / ".venv" / "lib" / "x.py", "<string>"):
        assert not own_warnings.is_ours(str(file))


@pytest.mark.train
def test_a_run_of_pytest(tmp_path):
    """With a summary of what others warn about, and all of it failing where that is asked for."""
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "conftest.py").write_text(
        textwrap.dedent(
            f"""
            import sys
            import pytest
            sys.path.insert(0, {str(Path(own_warnings.__file__).parent)!r})
            import own_warnings
            own_warnings.OURS = ({str(tmp_path / "tests")!r},)

            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_protocol():
                with own_warnings.failing():
                    return (yield)
            """
        )
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(
        "import warnings, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import theirs\n"
        "def test_theirs():\n    theirs.odd()\n    theirs.calls_old()\n"
        "def test_ours():\n    warnings.warn('ours')\n"
        "def test_caused():\n    theirs.old()\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "always"]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "2 failed, 1 passed" in out and "this looks odd" in out, out
    out = subprocess.run([*command, "-W", "error"], cwd=tmp_path, capture_output=True, text=True)
    assert "3 failed" in out.stdout, out.stdout
