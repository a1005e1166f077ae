"""What a tier's configuration accepts, and what it says of the rest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_tier import config
from async_tier.config import MAX_COPY_THREADS, TierConfig, load_policy, parse_threads
from async_tier.eviction import LeastRecentlyUsed
from async_tier.text import brief, format_size, parse_size

POWERS = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
POWERS |= {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (68719476736, 64 << 30),
        (1 << 70, 1 << 70),
        ("1", 1),
        ("4096", 4096),
        ("7B", 7),
        ("64GiB", 64 << 30),
        ("500 MB", 500_000_000),
        ("1.5 MB", 1_500_000),
        (" 10 kib ", 10 << 10),
        ("0.5 KiB", 512),
        ("2TB", 2 * 1000**4),
        ("\t2\ttib\n", 2 << 40),
        ("1.9999 B", 1),
        ("9007199254740993", 2**53 + 1),
        ("9007199254740993 KiB", (2**53 + 1) << 10),
        *((f"3{unit}", 3 * power) for unit, power in POWERS.items()),
        # As Helm writes large numbers, and Kubernetes all of them.
        (3.4359738368e10, 32 << 30),
        ("3.4359738368e+10", 32 << 30),
        (2e9, 2_000_000_000),
        (2.0, 2),
        *((text, 2_000_000_000) for text in ("2e9", "2E9", "2e+9", " 2.0e9 ", "20e08", "20000000000e-1")),
        ("1.5e3 KiB", 1500 << 10),
        ("10Gi", 10 << 30),
        ("512Mi", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("1.5Ti", 3 << 39),
        ("10Ki", 10 << 10),
        ("7 gi", 7 << 30),
        ("64k", 64_000),
        ("64K", 64_000),
        ("100M", 100_000_000),
        ("5G", 5_000_000_000),
        ("2T", 2 * 1000**4),
        ("10GB", 10_000_000_000),
        (" 10 GiB ", 10 << 30),
        ("1.1 GiB", 1181116006),  # of a fraction, whole bytes
        ("99999999999999999999", 10**20 - 1),
        (1 << 100, 1 << 100),
    ],
)
def test_a_size_is_a_number_or_text_with_a_unit(value: object, size: int):
    parsed = parse_size("bytes_to_use", value)
    assert parsed == size
    assert type(parsed) is int


WRONG_SIZES = [
    *(True, False, -1, 0, 1.5, 0.5, -2.0, -0.0, None, [1], {}, b"1GiB"),
    *(
        "",
        " ",
        "abc",
        "5 XB",
        "5 PiB",
        "5 Kii",
        "5 iB",
        "5 i",
        "100m",
        "100 m",
        "1E",
        "1e",
        "1E GiB",
        "0",
        "0 GiB",
        "0.4",
        "0.0001 KiB",
        "-1",
        "-1 GiB",
        "+1",
    ),
    *(
        "1e-1",
        "1e+",
        "e9",
        "1e9.5",
        "1e100",
        "1e+100",
        "1 e9",
        "1e9e9",
        "1,5 MB",
        "1 5",
        "1..5",
        ".5 MB",
        "5. MB",
        "GiB",
        "1 GiB extra",
        "1_000",
        "0x10",
        "inf",
        "nan",
    ),
    *(float("nan"), float("inf"), float("-inf"), "infinity", "NaN", "true", "null", "{{ .Values.size }}"),
    *("\N{ARABIC-INDIC DIGIT THREE}", "\N{FULLWIDTH DIGIT ONE} GiB", "1\N{NO-BREAK SPACE}GiB", "5 \N{KELVIN SIGN}iB"),
    *("a\0b", "1GiB\0", "\ud800", "1\ud800GiB", "1\n\n2", (1 << 100) + 1, 1e31, "1e31", "10000000000000000000 TiB"),
]
TOO_LONG = ["9" * 5000, "9" * 400 + ".5 GiB", "9" * 5000 + " TiB", 10**400, -(10**400), 10**5000, 1e300, [10**5000]]


@pytest.mark.parametrize("value", WRONG_SIZES)
def test_a_wrong_size_is_refused_by_key_and_value(value: object):
    with pytest.raises(ValueError, match=r"^some_key must be an integer number of bytes or text") as error:
        parse_size("some_key", value)
    assert str(error.value).endswith(f"not {value!r}")
    assert "'64GiB' or '500 MB', and at least 1 byte" in str(error.value)


def test_a_value_is_shown_on_one_line_and_shortened():
    assert brief("x" * 98) == repr("x" * 98)
    assert brief("x" * 99) == "'" + "x" * 99 + "... (101 characters)"
    assert brief(10**400) == "1" + "0" * 99 + "... (401 characters)"
    assert brief(10**5000) == "a value of type int that is too long to be shown"
    assert brief([10**5000]) == "a value of type list that is too long to be shown"
    assert brief("a\0b\ud800\n") == r"'a\x00b\ud800\n'"
    assert brief(np.zeros((2, 1))) == "array([[0.],        [0.]])"


def test_a_size_that_is_too_long_is_refused_by_key_and_shortened():
    for value in TOO_LONG:
        with pytest.raises(ValueError, match=r"^some_key must be .* and at most 2\^100, not ") as error:
            parse_size("some_key", value)
        assert len(str(error.value)) < 350


@given(st.integers(1, 10**18), st.sampled_from(sorted(POWERS)), st.sampled_from(["", " ", "  "]), st.booleans())
def test_whole_sizes_are_exact(number: int, unit: str, space: str, lower: bool):
    text = f"{number}{space}{unit.lower() if lower else unit}"
    assert parse_size("key", text) == number * POWERS[unit]
    assert parse_size("key", str(number)) == parse_size("key", number) == number


@given(st.integers(1024, (1 << 60) - 1))
def test_a_size_told_to_a_person_reads_back_as_about_itself(size: int):
    assert parse_size("key", format_size(size)) == pytest.approx(size, rel=0.05)


@given(st.text(alphabet="0123456789.-+ eEkKmMgGtTiIbBxX_,²٣\0\ud800"))
def test_any_text_is_a_size_or_a_value_error_that_names_the_key(text: str):
    try:
        assert parse_size("the_key", text) >= 1
    except ValueError as error:
        assert str(error).startswith("the_key must be")  # noqa: PT017 - both outcomes are right


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (1536 << 20, "1.5 GiB")),
        *((1 << 20, "1.0 MiB"), (1 << 40, "1.0 TiB"), (1 << 50, "1024.0 TiB")),
    ],
)
def test_a_size_is_told_in_the_largest_unit_that_fits(size: int, text: str):
    assert format_size(size) == text


@pytest.mark.parametrize("value", [1, 2, MAX_COPY_THREADS])
def test_a_number_of_threads_is_taken(value: int):
    assert parse_threads("copy_threads", value) == value


@pytest.mark.parametrize("value", [0, -1, MAX_COPY_THREADS + 1, True, False, 1.0, "2", None, [2]])
def test_a_wrong_number_of_threads_is_refused_by_key_and_value(value: object):
    with pytest.raises(ValueError, match=r"^some_key must be an integer from 1 to 64, not ") as error:
        parse_threads("some_key", value)
    assert str(error.value).endswith(f"not {value!r}")


def test_without_options_there_are_defaults():
    assert dataclasses.asdict(TierConfig.parse({})) == {
        "bytes_to_use": None,
        "engine": "auto",
        "pool": "host",
        "namespace": None,
        "pool_on_disk": False,
        "device": None,
        "copy_threads": None,
        "staging_bytes": 64 << 20,
        "max_inflight_store_bytes": 32 << 20,
        "batch_copies": True,
        "keep_on_reset": False,
        "eviction_policy": "lru",
        "enable_kv_events": False,
        "locality": None,
        "trace_path": None,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bytes_to_use": "64GiB"}, {"bytes_to_use": 64 << 30}),
        ({"bytes_to_use": None}, {"bytes_to_use": None}),
        ({"engine": "auto"}, {"engine": "auto"}),
        ({"engine": "host"}, {"engine": "host"}),
        ({"engine": "cuda"}, {"engine": "cuda"}),
        ({"pool": "host"}, {"pool": "host"}),
        ({"pool": "cuda:12"}, {"pool": "cuda:12"}),
        ({"engine": "cuda", "pool": "cuda:0"}, {"engine": "cuda", "pool": "cuda:0"}),
        ({"engine": "cuda", "device": "cuda:3"}, {"engine": "cuda", "device": "cuda:3"}),
        ({"device": "cuda:3"}, {"device": "cuda:3"}),
        ({"device": None}, {"device": None}),
        ({"pool": "cuda:1", "device": "cuda:01"}, {"pool": "cuda:1", "device": "cuda:01"}),
        ({"staging_bytes": "64KiB"}, {"staging_bytes": 64 << 10}),
        ({"max_inflight_store_bytes": 1}, {"max_inflight_store_bytes": 1}),
        ({"batch_copies": False}, {"batch_copies": False}),
        ({"copy_threads": 64}, {"copy_threads": 64}),
        ({"copy_threads": None}, {"copy_threads": None}),
        ({"keep_on_reset": True}, {"keep_on_reset": True}),
        ({"eviction_policy": "lru"}, {"eviction_policy": "lru"}),
        ({"eviction_policy": "a.b:C"}, {"eviction_policy": "a.b:C"}),
        ({"locality": "LOCAL"}, {"locality": "LOCAL"}),
        ({"locality": "REMOTE"}, {"locality": "REMOTE"}),
        ({"locality": None}, {"locality": None}),
        ({"trace_path": "tier-{pid}.json"}, {"trace_path": "tier-{pid}.json"}),
    ],
)
def test_an_option_is_kept(options: dict, expected: dict):
    assert TierConfig.parse(options) == dataclasses.replace(TierConfig(), **expected)


def test_parsing_leaves_the_options_as_they_are():
    options = {"bytes_to_use": "1 KiB", "copy_threads": 3}
    assert TierConfig.parse(options).bytes_to_use == 1024
    assert options == {"bytes_to_use": "1 KiB", "copy_threads": 3}


def test_a_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TierConfig().engine = "host"  # type: ignore[misc]


@pytest.mark.parametrize("key", ["bytes_to_us", "Engine", "", 3, None])
def test_an_unknown_key_is_refused_with_the_known_ones(key: object):
    with pytest.raises(ValueError, match="unknown key") as error:
        TierConfig.parse({key: 1})
    assert repr(key) in str(error.value)
    for known in ("bytes_to_use", "engine", "pool", "copy_threads", "staging_bytes", "custom_param"):
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *(
            ("bytes_to_use", value, "bytes_to_use must be an integer")
            for value in (0, True, -1, "abc", "5 XB", 1.5, [1])
        ),
        *(("copy_threads", value, "copy_threads must be an integer") for value in (0, 65, True, "2", 2.0)),
        *(
            ("engine", value, "engine must be one of 'auto', 'cuda', 'host'")
            for value in ("gpu", "HOST", "", None, 1, [])
        ),
        *(
            ("pool", value, "pool must be 'host' or 'cuda:N' with a device's number N,")
            for value in (
                "cpu",
                "Host",
                "cuda:\N{ARABIC-INDIC DIGIT THREE}",
                "",
                None,
                0,
                ["host"],
                "cuda",
                "cuda:",
                "cuda:x",
                "cuda:-1",
                "cuda:0 ",
            )
        ),
        *(
            ("device", value, "device must be null or 'cuda:N' with a device's number N,")
            for value in (
                "host",
                "cuda",
                "cuda:",
                "cuda:x",
                "cuda:-1",
                "cuda:0 ",
                "CUDA:0",
                "",
                "1",
                1,
                0,
                True,
                ["cuda:0"],
            )
        ),
        *(
            (key, value, f"{key} must be an integer number of bytes")
            for key in ("staging_bytes", "max_inflight_store_bytes")
            for value in (0, None, True, "x", 1.5)
        ),
        ("staging_bytes", 65535, "staging_bytes must be at least 65536 bytes"),
        *(
            (key, value, f"{key} must be true or false")
            for key in ("keep_on_reset", "batch_copies")
            for value in (0, 1, None, "true", "no")
        ),
        *(
            ("eviction_policy", value, "eviction_policy must be 'lru' or 'module:Class'")
            for value in (
                "LRU",
                "arc",
                "",
                None,
                1,
                [],
                "module",
                ":Class",
                "module:",
                "a:b:c",
                "a b:C",
                "a:b.c",
                "lru\n",
            )
        ),
        *(("locality", value, "locality must be null, 'LOCAL' or 'REMOTE'") for value in ("local", "", True, 1, [])),
    ],
)
def test_a_wrong_value_is_refused_by_key_and_value(key: str, value: object, message: str):
    with pytest.raises(ValueError, match=f"^{message}") as error:
        TierConfig.parse({key: value})
    assert str(error.value).endswith(f"not {value!r}")


# Whatever JSON or YAML can hold, or a template leaves in it.
STRANGE = [*WRONG_SIZES, *TOO_LONG, "\udc80", [[]], [10**5000], {"a": {}}, "x" * 100_000, "../..", "\u202e", ":", "a:b"]


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(TierConfig)])
def test_whatever_a_key_is_set_to_is_taken_or_refused_in_a_sentence(key: str):
    for value in STRANGE:
        try:
            TierConfig.parse({key: value})
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{key} must be")
            assert message.isprintable()
            assert len(message) < 500


def test_whatever_a_key_is_called_is_refused_in_a_sentence():
    for key in STRANGE:
        if isinstance(key, (list, dict)):
            continue  # cannot be one
        with pytest.raises(ValueError, match=r"^unknown key ") as error:
            TierConfig.parse({key: 1})
        assert str(error.value).startswith(f"unknown key {brief(key)} in the tier's configuration; the known keys are")
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500


def test_a_trace_path_is_one_that_a_system_takes():
    assert TierConfig.parse({"trace_path": "\udc80\n é"}).trace_path == "\udc80\n é"  # bytes are what they are
    for value in ("a\0b", "\0", "\ud800", ""):
        with pytest.raises(ValueError, match=r"^trace_path must be null or the name of a file, not "):
            TierConfig.parse({"trace_path": value})


def test_a_pool_in_a_folder_has_a_namespace():
    config = TierConfig.parse({"pool": "/dev/shm/pool", "namespace": "a model, revision 3", "pool_on_disk": True})
    assert (config.pool_folder, config.is_on_device) == (Path("/dev/shm/pool"), False)
    for name in (None, "", "  ", "x" * 257, "a\nb", 1, True, ["a"], "\udc80"):
        with pytest.raises(ValueError, match=r"^namespace must be a name of 1 to 256 printable characters .*, not "):
            TierConfig.parse({"pool": "/dev/shm/pool", "namespace": name})
    for pool in ("host", "cuda:0"):
        with pytest.raises(ValueError, match=r"^namespace must be null unless pool is the absolute path of a folder, "):
            TierConfig.parse({"pool": pool, "namespace": "a"})
        with pytest.raises(ValueError, match=r"^pool_on_disk must be false unless pool is the absolute path"):
            TierConfig.parse({"pool": pool, "pool_on_disk": True})


@pytest.mark.parametrize("pool", ["dev/shm/pool", "./pool", "~/pool", "/a\0b", "/\ud800"])
def test_a_pools_folder_is_an_absolute_path(pool):
    with pytest.raises(ValueError, match=r"^pool must be 'host' or 'cuda:N' .* or the absolute path of a folder, not "):
        TierConfig.parse({"pool": pool, "namespace": "a"})


def test_a_pool_on_a_gpu_is_not_for_copy_threads():
    with pytest.raises(ValueError, match=r"^pool 'cuda:0' needs engine 'cuda' or 'auto', not 'host'$"):
        TierConfig.parse({"pool": "cuda:0", "engine": "host"})


def test_a_device_is_not_for_copy_threads():
    with pytest.raises(ValueError, match=r"^device 'cuda:1' needs engine 'cuda' or 'auto', not 'host'$"):
        TierConfig.parse({"device": "cuda:1", "engine": "host"})


@pytest.mark.parametrize("engine", ["auto", "cuda"])
def test_a_device_is_no_other_than_the_pools(engine):
    with pytest.raises(ValueError, match=r"^device 'cuda:1' must be the one of pool 'cuda:0', or null$"):
        TierConfig.parse({"device": "cuda:1", "pool": "cuda:0", "engine": engine})


def test_a_policys_module_that_exits_is_refused(tmp_path, monkeypatch):
    (tmp_path / "exits_at_once.py").write_text("raise SystemExit('no\\nway')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^eviction_policy must be .*SystemExit: 'no\\nway'.*not 'exits_at_once:A'$"):
        load_policy("exits_at_once:A")


def test_a_policy_needs_nothing_but_a_name(monkeypatch):
    monkeypatch.setitem(config.POLICIES, "another", LeastRecentlyUsed)
    name = TierConfig.parse({"eviction_policy": "another"}).eviction_policy
    assert load_policy(name) is LeastRecentlyUsed


def test_a_policy_is_found_by_its_name():
    assert load_policy("lru") is LeastRecentlyUsed
    assert load_policy("benchmarks.bench.plain_lru:PlainLru").__name__ == "PlainLru"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no_such_module:Class", "that one that can be imported"),
        ("async_tier.eviction:NoSuchClass", "that one that can be imported"),
        (".eviction:LeastRecentlyUsed", "that one that can be imported"),
        ("async_tier.config:TierConfig", "a class over async_tier.eviction.EvictionPolicy"),
        ("async_tier.config:load_policy", "a class over async_tier.eviction.EvictionPolicy"),
        ("async_tier.eviction:EvictionPolicy", "with all its methods"),
    ],
)
def test_a_policy_that_is_none_is_refused_in_one_sentence(name: str, why: str):
    with pytest.raises(ValueError, match=f"^eviction_policy must be 'lru' or 'module:Class', .*{why}") as error:
        load_policy(name)
    assert str(error.value).endswith(f"not {name!r}")
    assert "\n" not in str(error.value)
