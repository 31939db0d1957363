"""Settings: defaults, bounds, and their documentation held equal to the code."""

import subprocess
import sys
from pathlib import Path

import pytest

from inference_service.config import BadSettings, Settings, load_settings

ROOT = Path(__file__).parents[1]
NAMES = {field.upper() for field in Settings.model_fields}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def shown(value: object) -> str:
    """A default as an operator would write it."""
    if value is None or value == ():
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


DEFAULTS = {name.upper(): shown(field.default) for name, field in Settings.model_fields.items()}


def test_defaults() -> None:
    settings = load_settings()
    assert settings.gcs_bucket == "your-models-bucket"
    assert (settings.gcs_model_prefix, settings.local_model_cache) == (
        "models/",
        Path("/tmp/model_cache"),
    )
    assert (settings.max_cached_models, settings.max_concurrent_requests) == (2, 50)
    assert (settings.request_timeout, settings.default_max_tokens) == (300, 512)
    assert (settings.default_temperature, settings.local_dev, settings.port) == (0.7, False, 8080)


def test_local_dev_takes_one_request_at_a_time_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_DEV", "true")
    assert load_settings().concurrency == 1
    monkeypatch.setenv("MAX_CONCURRENT_REQUESTS", "7")
    assert load_settings().concurrency == 7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eighty"),
        ("PORT", "70000"),
        ("MAX_CACHED_MODELS", "0"),
        ("REQUEST_TIMEOUT", "-1"),
        ("REQUEST_TIMEOUT", "nan"),
        ("ENGINE", "ollama"),
        ("DTYPE", "int3"),
        ("DEFAULT_TEMPERATURE", "3"),
        ("GCS_BUCKET", "s3://bucket"),
        ("GCS_BUCKET", "file://relative"),
        ("GCS_BUCKET", "bucket/path"),
        ("GCS_BUCKET", "Bad_Bucket!"),
        ("GCS_BUCKET", "file:///no/such/directory"),
        ("TENSOR_PARALLEL_SIZE", "many"),
        ("LOCAL_DEV", "perhaps"),
    ],
)
def test_a_bad_value_names_the_variable_and_the_value(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings) as caught:
        load_settings()
    assert str(caught.value).startswith(f"{name}='{value}' is not allowed: ")
    assert "\n" not in str(caught.value)


def test_a_bad_value_says_what_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "x")
    monkeypatch.setenv("TENSOR_PARALLEL_SIZE", "two")
    with pytest.raises(BadSettings) as caught:
        load_settings()
    assert "allowed: at least 0 and at most 65535" in str(caught.value)
    assert str(caught.value).count("TENSOR_PARALLEL_SIZE") == 1


@pytest.mark.parametrize("value", ["0", "65", "Auto"])
def test_a_bad_value_of_two_kinds_says_what_is_allowed_of_each(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MAX_CACHED_MODELS", value)
    with pytest.raises(BadSettings, match=r"'auto' or .*; allowed: at least 1 and at most 64 \("):
        load_settings()


def test_a_bad_value_stops_the_start_with_one_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "inference_service"],
        env={"PORT": "x", "PATH": "/usr/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("inference-service: PORT='x' is not allowed")
    assert ended.stderr.count("\n") == 1


def test_dotenv(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("GCS_BUCKET=from-dotenv\nMAX_MODEL_LEN=\nPRELOAD_MODELS=a, b/c\n")
    settings = load_settings()
    assert settings.gcs_bucket == "from-dotenv"
    assert settings.max_model_len is None, "empty means unset"
    assert settings.preload_models == ("a", "b/c")


@pytest.mark.parametrize(
    ("given", "load", "place"),
    [
        ({}, 290.0, 120.0),
        ({"REQUEST_TIMEOUT": "590"}, 580.0, 120.0),
        ({"REQUEST_TIMEOUT": "20"}, 19.0, 120.0),
        ({"QUEUE_TIMEOUT": "60"}, 60.0, 60.0),
        ({"QUEUE_TIMEOUT": "900"}, 900.0, 900.0),
    ],
)
def test_how_long_a_request_waits(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], load: float, place: float
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.load_wait.seconds, settings.place_wait.seconds) == (load, place)
    default = "QUEUE_TIMEOUT" if "QUEUE_TIMEOUT" in given else "the default; QUEUE_TIMEOUT sets another"
    assert str(settings.place_wait) == f"{place:g} s ({default})"
    source = "QUEUE_TIMEOUT" if "QUEUE_TIMEOUT" in given else "REQUEST_TIMEOUT less"
    assert str(settings.load_wait).startswith(f"{load:g} s ({source}")


@pytest.mark.parametrize("key", ["a", "0123456789abcdef", "with-a-line-break\n", "  spaced  "])
def test_a_key_is_kept_and_not_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("ADMIN_API_KEY", key)
    settings = load_settings()
    assert settings.admin_api_key is not None
    assert settings.admin_api_key.get_secret_value() == key.strip()
    assert key.strip() == "a" or key.strip() not in repr(settings)


@pytest.mark.parametrize("key", [" ", "\n", "two words", "schlüssel", "tab\tinside", "a\x00b"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_printed(
    monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (Path(".env")).write_text(f'ADMIN_API_KEY="{key}"\n')
    with pytest.raises(BadSettings) as caught:
        load_settings()
    assert str(caught.value).startswith("ADMIN_API_KEY is not allowed: one or more printable ASCII")
    assert not key.strip() or key not in str(caught.value)


def test_open_and_locked_at_once_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_API_KEY", "s3cret-key")
    monkeypatch.setenv("ADMIN_OPEN", "true")
    with pytest.raises(
        BadSettings, match="ADMIN_OPEN=true and ADMIN_API_KEY contradict each other"
    ) as caught:
        load_settings()
    assert "s3cret-key" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("gs://my-bucket/", "my-bucket"), ("my-bucket", "my-bucket"), ("file:///tmp/", "file:///tmp")],
)
def test_buckets(monkeypatch: pytest.MonkeyPatch, given: str, kept: str) -> None:
    monkeypatch.setenv("GCS_BUCKET", given)
    assert load_settings().gcs_bucket == kept


@pytest.mark.parametrize(("given", "kept"), [("a/b", "a/b/"), ("/a/", "a/"), ("", "models/"), ("/", "")])
def test_prefixes(monkeypatch: pytest.MonkeyPatch, given: str, kept: str) -> None:
    monkeypatch.setenv("GCS_MODEL_PREFIX", given)
    assert load_settings().gcs_model_prefix == kept


@pytest.mark.parametrize(
    "place", ["/shared/compiled", "file:///shared", "gs://my-bucket", "gs://my-bucket/a/b"]
)
def test_places_for_compiled_artefacts(place: str) -> None:
    assert Settings(compile_cache=place).compile_cache == place


@pytest.mark.parametrize(
    "place", ["gs://", "gs:///prefix", "gs://Not A Bucket/x", "s3://bucket", "relative/dir"]
)
def test_places_that_are_none(place: str) -> None:
    with pytest.raises(ValueError, match="compile_cache"):
        Settings(compile_cache=place)
