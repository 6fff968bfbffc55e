"""Logs: one line per record, in text and in JSON, at the level that TGI's LOG_LEVEL asks for."""

import json
import logging

import pytest

from serving.telemetry import logs

pytestmark = pytest.mark.usefixtures("logging_restored")


def test_text_is_one_line_a_record(capsys):
    logs.configure("info", json_output=False)
    logging.getLogger("serving.x").warning("two\nlines %d", 7)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert line.endswith("Z  WARN serving.x: two\\nlines 7\n")


def test_json_is_one_object_a_line_with_the_keys_of_tgi(capsys):
    logs.configure("info", json_output=True)
    logging.getLogger("serving.x").info("ü %s", "and\nmore")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("serving.x").exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first.keys() == {"timestamp", "level", "message", "target"}
    assert (first["level"], first["message"], first["target"]) == ("INFO", "ü and\nmore", "serving.x")
    assert "ValueError: bad" in second["exception"]


@pytest.mark.parametrize(
    ("directives", "level"),
    [
        ("info", logging.INFO),
        ("DEBUG", logging.DEBUG),
        ("warn", logging.WARNING),
        ("error", logging.ERROR),
        ("trace", logging.DEBUG),
        ("text_generation_router=debug,info", logging.DEBUG),
        ("warn,text_generation_launcher=info", logging.INFO),
        ("hyper=off,error", logging.ERROR),
        ("hyper=debug", logging.INFO),
        ("nonsense", logging.INFO),
        ("", logging.INFO),
    ],
)
def test_log_level_takes_the_words_of_tgi(directives, level):
    assert logs.parse_level(directives) == level


def test_other_libraries_are_heard_from_warnings_up(capsys):
    logs.configure("debug", json_output=False)
    logging.getLogger("urllib3").info("quiet")
    logging.getLogger("urllib3").warning("loud")
    logging.getLogger("serving.x").debug("ours")
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["loud", "ours"]


def test_off_is_silent(capsys):
    logs.configure("off", json_output=False)
    logging.getLogger("serving.x").error("anything")
    assert capsys.readouterr().out == ""


def test_configuring_twice_writes_once(capsys):
    logs.configure("info", json_output=False)
    logs.configure("info", json_output=False)
    logging.getLogger("serving.x").info("once")
    assert capsys.readouterr().out.count("once") == 1


def test_fields_stand_behind_the_message_and_cannot_begin_a_line(capsys):
    for json_output in (False, True):
        logs.configure("info", json_output=json_output)
        logging.getLogger("serving.x").info("Done", extra={"fields": {"status": 200, "name": "a\nb"}})
    text, line = capsys.readouterr().out.splitlines()
    assert text.endswith('serving.x: Done status=200 name="a\\nb"')
    assert json.loads(line) | {"timestamp": ""} == {
        "timestamp": "",
        "level": "INFO",
        "message": "Done",
        "target": "serving.x",
        "status": 200,
        "name": "a\nb",
    }
