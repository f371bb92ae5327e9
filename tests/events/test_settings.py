"""Settings: the file is overridden by the environment, and a mistake is named rather than ignored."""

import pytest

from events.errors import ConfigError
from events.settings import load


@pytest.fixture(autouse=True)
def _no_outside_settings(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("KPROBE_CONFIG", "KPROBE_KAFKA__BOOTSTRAP_SERVERS"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_point_at_the_local_servers():
    assert load().kafka.bootstrap_servers == "127.0.0.1:19092"


def test_the_environment_overrides_one_field_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "site.yaml"
    path.write_text("kafka: {bootstrap_servers: 'file:1', extra: {client.id: x}}\n")
    monkeypatch.setenv("KPROBE_KAFKA__BOOTSTRAP_SERVERS", "env:2")

    settings = load(path)

    assert settings.kafka.bootstrap_servers == "env:2"
    assert settings.kafka.extra == {"client.id": "x"}


def test_kprobe_yaml_in_the_current_folder_is_found(tmp_path):
    (tmp_path / "kprobe.yaml").write_text("probe: {node: node-23}\n")

    assert load().probe.node == "node-23"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kafka: {bootstrap_server: x}", r"kafka\.bootstrap_server: Extra inputs are not permitted \(got 'x'\)"),
        ("probe: {cpu_share_max: 0}", r"probe\.cpu_share_max: Input should be greater than 0"),
        ("- a", r"must hold a mapping of sections, not list"),
        ("a: [", r"is not YAML"),
    ],
    ids=["unknown key", "out of range", "not a mapping", "not yaml"],
)
def test_a_mistake_in_the_file_is_named(tmp_path, text, message):
    path = tmp_path / "site.yaml"
    path.write_text(text)

    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="cannot read settings file"):
        load(tmp_path / "nowhere.yaml")
