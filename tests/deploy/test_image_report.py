"""The report of an image's size: what it reads from an engine, and when it says too large. The engine is a stand-in."""

import json
import stat
import sys
import zlib

import pytest

from scripts.image_report import LIMITS_GB, instruction, kind_of, layers_of, main

HISTORY = """\
0 "ENTRYPOINT [\\"/opt/weir/bin/python\\"]"
10000000 "RUN |2 TORCH=cuda VERSION=1 /bin/sh -c pip install   /server/*.whl \\u0026\\u0026 pip check # buildkit"
0 "ARG VERSION=unknown"
4700000000 "COPY /opt/weir /opt/weir # buildkit"
90000000 ""
"""
ENGINE = """#!{python}
import sys
answers = {answers!r}
words = sys.argv[1:]
key = "inspect" if words[0] == "image" else words[0]
if words[0] == "run":
    assert "--network=none" in words and "--entrypoint=/opt/weir/bin/python" in words
    compile(words[-1], "measures", "exec")
if key not in answers:
    sys.exit("cannot connect\\nno such image")
sys.stdout.write(answers[key])
"""


@pytest.fixture
def engine(tmp_path):
    """A stand-in for docker that answers so."""

    def make(**answers: str) -> str:
        path = tmp_path / "engine"
        path.write_text(ENGINE.format(python=sys.executable, answers=answers))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def answers(size: float) -> dict[str, str]:
    packages = {"torch": 1_150_000_000, **{f"small-{i:02}": 1_000_000 for i in range(20)}}
    return {"inspect": f"{int(size)}\n", "history": HISTORY, "run": json.dumps(packages), "save": "a" * 5_000_000}


def test_an_instruction_is_told_in_one_line_without_the_shell_and_the_builders_arguments():
    assert instruction("RUN |2 A=1 B=2 /bin/sh -c apt-get x &&     rm y # buildkit") == "RUN apt-get x && rm y"
    assert instruction('/bin/sh -c #(nop)  CMD ["bash"]') == '/bin/sh -c #(nop) CMD ["bash"]'
    assert instruction("") == "(the base image)"


def test_layers_stand_from_the_base_up_and_those_that_hold_nothing_are_left_out():
    assert [(layer.size, layer.made_by) for layer in layers_of(HISTORY)] == [
        (90_000_000, "(the base image)"),
        (4_700_000_000, "COPY /opt/weir /opt/weir"),
        (10_000_000, "RUN pip install /server/*.whl && pip check"),
    ]


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        ("weir:cuda", "cuda"),
        ("111122223333.dkr.ecr.eu-west-1.amazonaws.com/weir:0123456789ab-cuda", "cuda"),
        ("localhost:5000/weir:cpu@sha256:0123", "cpu"),
        ("localhost:5000/weir", ""),
    ],
)
def test_the_tag_names_the_kind(image, kind):
    assert kind_of(image) == kind


def test_the_largest_packages_are_named_and_the_others_added_up(engine, capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["weir:cuda", "--engine", engine(**answers(5e9)), "--json", str(file)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "   5000.0 MB weir:cuda"
    assert "   1150.0 MB torch" in shown
    assert shown[-1] == "      9.0 MB 9 others"
    told = json.loads(file.read_text())
    assert (told["size"], told["compressed"], told["packages"]["torch"]) == (5_000_000_000, None, 1_150_000_000)
    assert [layer["size"] for layer in told["layers"]] == [90_000_000, 4_700_000_000, 10_000_000]


def test_an_image_past_its_kinds_limit_fails_and_one_of_another_kind_has_none(engine, capsys):
    size = LIMITS_GB["cuda"] * 1e9
    assert main(["weir:cuda", "--engine", engine(**answers(size))]) == 0
    assert main(["weir:cuda", "--engine", engine(**answers(size + 1))]) == 1
    assert "TOO LARGE" in capsys.readouterr().err
    assert main(["weir:cuda", "--engine", engine(**answers(size + 1)), "--limit", "100"]) == 0
    assert main(["weir:cpu", "--engine", engine(**answers(size))]) == 1
    assert main(["mine:latest", "--engine", engine(**answers(size))]) == 0


def test_what_a_registry_would_keep_is_counted_where_it_is_asked_for(engine, capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["weir:cuda", "--engine", engine(**answers(5e9)), "--compressed", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["compressed"] == len(zlib.compress(b"a" * 5_000_000, 6))
    assert "compressed" in capsys.readouterr().out


def test_an_image_that_is_not_there_is_said_in_one_line(engine, capsys):
    assert main(["weir:cuda", "--engine", engine()]) == 2
    assert capsys.readouterr().err == "image_report: weir:cuda cannot be read: no such image\n"
    assert main(["weir:cuda", "--engine", "/no/such/engine"]) == 2
