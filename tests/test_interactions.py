# SPDX-License-Identifier: Apache-2.0
import doctest
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_msl.data import interactions, tables
from trl_msl.data.interactions import (
    covering_windows,
    k_core,
    read_interactions,
    read_windows,
    sliding_windows,
    split_by_time,
)


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
triples = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 9))
logs = st.lists(triples, min_size=1, max_size=40).map(lambda rows: make_log(*zip(*rows, strict=True)))


def make_log(users, items, timestamps):
    return pd.DataFrame({"user_id": list(users), "item_id": list(items), "timestamp": list(timestamps)})


def write_windows(folder, *rows, name="train.csv", header="user_id,item_ids,timestamp"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n")


def test_doctests():
    result = doctest.testmod(interactions)
    assert result.failed == 0
    assert result.attempted >= 6


class TestReadWindows:
    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("amazon_books", {"train": 31_554, "validation": 3_506, "test": 4_383}),
            ("amazon_office", {"train": 13_860, "validation": 1_540, "test": 1_925}),
        ],
    )
    def test_authors_data(self, name, sizes):
        if not (SHARED_DATA / name).is_dir():
            pytest.skip(f"{SHARED_DATA / name} is absent")
        windows = read_windows(SHARED_DATA / name)
        assert windows.num_rows == sizes
        times = [windows[split][:]["timestamp"] for split in sizes]
        assert times[0] + times[1] == sorted(times[0] + times[1])
        assert times[1][-1] <= min(times[2])
        lengths = {len(items) for split in sizes for items in windows[split][:]["item_ids"]}
        assert lengths == set(range(5, 12))
        if name == "amazon_books":  # the file's first row
            items = ["1948", "1807", "1702", "1307", "1600"]
            assert windows["train"][0] == {"user_id": "9045", "item_ids": items, "timestamp": 900547200}

    def test_validation_is_the_last_part_by_time_and_ties_keep_file_order(self, tmp_path):
        write_windows(tmp_path, '1,"[1, 2]",30', '2,"[3, 4]",10', "3,\"['a', 'b', '07']\",30", '4,"[5, 6]",20')
        write_windows(tmp_path, '6,"[1, 2]",50', '5,"[1, 2]",40', name="held_out.csv")
        windows = read_windows(tmp_path, test_file="held_out.csv", validation_fraction=0.25)
        assert list(windows) == ["train", "validation", "test"]
        assert windows["train"][:]["user_id"] == ["2", "4", "1"]
        assert windows["validation"].to_list() == [{"user_id": "3", "item_ids": ["a", "b", "07"], "timestamp": 30}]
        assert windows["test"][:]["user_id"] == ["6", "5"]

    def test_has_the_features_of_sliding_windows(self, tmp_path):
        write_windows(tmp_path, '1,"[1, 2]",30', '2,"[3, 4]",10')
        features = read_windows(tmp_path, test_file="train.csv", validation_fraction=0.5)["test"].features
        assert features == sliding_windows(make_log("aa", "xy", [1, 2])).features

    @pytest.mark.parametrize(
        "cell",
        ['"[1, 2"', '"[1 2 3]"', '"{1, 2}"', '"(1, 2)"', "12", "[3]", "[]", "", '"[1.5, 2]"', '"[None, 2]"']
        + ['"[True, 2]"', "\"['', 'a']\"", "\"['a' 'b', 'c']\"", '"[1, [2]]"', '"__import__(1), 2"'],
    )
    def test_malformed_list(self, tmp_path, cell):
        write_windows(tmp_path, '1,"[1, 2]",30', f"2,{cell},40")
        with pytest.raises(ValueError, match=r"train\.csv, row 1: item_ids must be a list of at least 2 ids"):
            read_windows(tmp_path)

    @pytest.mark.parametrize(
        ("header", "rows", "match"),
        [
            ("user_id,items,timestamp", ['1,"[1, 2]",30'], r"train\.csv lacks the columns \['item_ids'\] and has"),
            ("user_id,item_ids,timestamp", [], r"train\.csv has no rows"),
            (
                "user_id,item_ids,timestamp",
                ["1,[1, 2],30"],
                r"train\.csv cannot be read: .*more cells than its header",
            ),
            ("user_id,item_ids,timestamp", [',"[1, 2]",30'], r"'user_id' must hold an id, but 1 of 1 rows"),
            ("user_id,item_ids,timestamp", ['1,"[1, 2]",'], r"'timestamp' must hold a number .* 1 of 1 rows"),
            ("user_id,item_ids,timestamp", ['1,"[1, 2]",30'], r"1 windows leave \['train'|\['validation'\] empty"),
        ],
    )
    def test_other_faults_of_a_file(self, tmp_path, header, rows, match):
        write_windows(tmp_path, *rows, header=header)
        with pytest.raises(ValueError, match=match):
            read_windows(tmp_path)

    def test_missing_and_unreadable_files(self, tmp_path):
        with pytest.raises(ValueError, match=r"train\.csv cannot be read: .*No such file.* Check its path"):
            read_windows(tmp_path)
        with pytest.raises(ValueError, match=r"train\.txt cannot be read: No such file"):
            read_windows(tmp_path, train_file="train.txt")
        (tmp_path / "train.txt").touch()
        with pytest.raises(ValueError, match=r"train\.txt cannot be read: its format is not known: it must be \.csv"):
            read_windows(tmp_path, train_file="train.txt")
        (tmp_path / "train.csv").write_bytes(b"user_id\n\xff\xfe")
        with pytest.raises(ValueError, match=r"train\.csv cannot be read: .*utf-8"):
            read_windows(tmp_path)

    @pytest.mark.parametrize("fraction", [0, 1, -0.1, 10])
    def test_validation_fraction(self, fraction):
        with pytest.raises(ValueError, match=f"`validation_fraction` is {fraction}: it must lie between 0 and 1"):
            read_windows("anywhere", validation_fraction=fraction)


class TestReadInteractions:
    def test_sources_agree(self, tmp_path, monkeypatch):
        log = make_log([20, 3, 20, 3], [1, 2, 3, 4], [5, 6, 4, 6])
        expected = make_log(["20", "20", "3", "3"], ["3", "1", "2", "4"], [4, 5, 6, 6])  # "20" < "3" as strings
        log.to_csv(tmp_path / "log.csv", index=False)
        log.to_parquet(tmp_path / "log.parquet")
        dataset = Dataset.from_pandas(log)
        requests = []
        monkeypatch.setattr(tables, "load_dataset", lambda *args, **kw: requests.append((args, kw)) or dataset)
        for source in (log, dataset, tmp_path / "log.csv", str(tmp_path / "log.parquet"), "someone/some_log"):
            pd.testing.assert_frame_equal(read_interactions(source), expected)
        assert requests == [(("someone/some_log",), {"split": "train"})]

    @pytest.mark.parametrize("suffix", ["tsv", "csv.gz", "TSV.GZ", "csv.zip", "jsonl", "ndjson", "jsonl.gz"])
    def test_formats_agree(self, tmp_path, suffix):
        log = make_log(["007", "007", "b"], ['a "b"', "NA", "1e5"], [1, 2, 3])
        path = tmp_path / f"log.{suffix}"
        if "json" in suffix:
            log.to_json(path, orient="records", lines=True)
        else:
            log.to_csv(path, index=False, sep="\t" if "tsv" in suffix.lower() else ",")
        pd.testing.assert_frame_equal(read_interactions(str(path)), read_interactions(log))

    def test_values_of_json_lines_are_as_written(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text('{"user_id": "1.0", "item_id": 9007199254740993, "timestamp": "2020-01-01"}\n')
        expected = make_log(["1.0"], ["9007199254740993"], [1577836800])
        pd.testing.assert_frame_equal(read_interactions(path), expected)
        path.write_text('{"user_id": "2020-01-01", "item_id": "x", "timestamp": 1577836800.25}\n')
        pd.testing.assert_frame_equal(read_interactions(path), make_log(["2020-01-01"], ["x"], [1577836800.25]))

    def test_column_names_and_extra_columns(self):
        log = pd.DataFrame({"who": ["a"], "rating": [5], "what": ["x"], "when": [1]})
        result = read_interactions(log, user_column="who", item_column="what", timestamp_column="when")
        assert result.to_dict("list") == {"user_id": ["a"], "item_id": ["x"], "timestamp": [1]}

    def test_ids_of_a_csv_keep_their_spelling(self, tmp_path):
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n007,NA,3\n007,null,2\n007,1e5,1\n")
        result = read_interactions(tmp_path / "log.csv")
        assert result["item_id"].tolist() == ["1e5", "null", "NA"]
        assert set(result["user_id"]) == {"007"}

    @given(logs)
    def test_is_sorted_stable_and_idempotent(self, log):
        rows = list(zip(log["user_id"].astype(str), log["item_id"].astype(str), log["timestamp"], strict=True))
        expected = sorted(rows, key=lambda row: (row[0], row[2]))  # sorted() is stable
        result = read_interactions(log)
        assert list(result.itertuples(index=False, name=None)) == expected
        pd.testing.assert_frame_equal(read_interactions(result), result)

    @pytest.mark.parametrize(
        ("timestamps", "expected"),
        [
            # 2020-01-01 is 50 years of 365 days and 12 leap days after 1970: (50 * 365 + 12) * 86,400 = 1,577,836,800.
            (["2020-01-01", "2020-01-01T00:01:00Z"], [1577836800, 1577836860]),
            (["2020-01-01T01:00:00+02:00", "2020-01-01"], [1577836800 - 3600, 1577836800]),
            (pd.to_datetime(["2020-01-01", "2020-01-02"]), [1577836800, 1577836800 + 86400]),
            (pd.to_datetime(["2020-01-01", "2020-01-02"]).as_unit("ns"), [1577836800, 1577836800 + 86400]),
            (pd.to_datetime(["2020-01-01"] * 2).tz_localize("Asia/Tokyo"), [1577836800 - 9 * 3600] * 2),
            (["2020-01-01", "2020-01-01 00:00:00.250"], [1577836800, 1577836800.25]),
            (["7", "8"], [7, 8]),
            ([7.0, 8.0], [7, 8]),
            ([7.5, 8.0], [7.5, 8.0]),
            ([1e300, 2e300], [1e300, 2e300]),
            ([10**18, 10**18 + 1], [10**18, 10**18 + 1]),
            (pd.array([7, 8], dtype="Int64"), [7, 8]),
        ],
    )
    def test_timestamps(self, timestamps, expected):
        result = read_interactions(make_log("aa", "xy", timestamps))["timestamp"]
        assert result.tolist() == expected
        assert result.dtype == (np.float64 if isinstance(expected[-1], float) else np.int64)

    @pytest.mark.parametrize(
        ("timestamps", "rows"),
        [
            ([1, None, 3], r"1 of 3 rows do not \(the first: \[1\], with .*nan"),
            ([1, np.inf, 3], r"1 of 3 rows do not \(the first: \[1\]"),
            (pd.array([1, None, 3], dtype="Int64"), r"1 of 3 rows do not \(the first: \[1\]"),
            (pd.to_datetime(["2020-01-01", None, None]), r"2 of 3 rows do not \(the first: \[1, 2\], with NaT"),
            (["2020-01-01", "yesterday", ""], r"2 of 3 rows do not \(the first: \[1, 2\], with 'yesterday'"),
            ([None, None, None], r"3 of 3 rows do not"),
            (["7", "yesterday", "8"], r"1 of 3 rows do not \(the first: \[1\], with 'yesterday'"),
        ],
    )
    def test_missing_and_invalid_timestamps(self, timestamps, rows):
        with pytest.raises(ValueError, match="'timestamp' must hold a number or an ISO 8601 date, but " + rows):
            read_interactions(make_log("aaa", "xyz", timestamps))

    def test_dates_among_numbers(self):
        times = ["7", "2020-01-01", "8", "2020-01-02T03:04:05", "yesterday", "9"]
        match = r"'timestamp' mixes 3 numbers, such as '7', with 2 ISO 8601 dates, such as '2020-01-01': write all"
        with pytest.raises(ValueError, match=match):
            read_interactions(make_log("aaaaaa", "xyzxyz", times))

    def test_missing_ids_are_counted_instead_of_becoming_floats(self, tmp_path):
        log = make_log([1] * 20, [12, None] * 10, range(20))
        assert log["item_id"].dtype == np.float64  # what pandas makes of 12, None
        match = r"'item_id' must hold an id, but 10 of 20 rows do not \(the first: \[1, 3, 5, 7, 9\], with .*nan"
        with pytest.raises(ValueError, match=match):
            read_interactions(log)
        log.astype({"item_id": "Int64"}).to_csv(tmp_path / "log.csv", index=False)
        with pytest.raises(ValueError, match=match):
            read_interactions(tmp_path / "log.csv")
        with pytest.raises(ValueError, match="'item_id' must hold an id, but 1 of 2 rows"):
            read_interactions(make_log("aa", ["", "x"], [1, 2]))

    @pytest.mark.parametrize(
        ("ids", "kind"),
        [([12.0, 13.0], "floating"), ([1, "a"], "mixed-integer"), ([True, False], "boolean"), ([b"a", b"b"], "bytes")],
    )
    def test_ids_of_other_kinds(self, ids, kind):
        with pytest.raises(ValueError, match=rf"'item_id' has {kind} ids: .*astype\('int64'\)"):
            read_interactions(make_log("aa", ids, [1, 2]))

    def test_categories_are_judged_by_their_values(self):
        assert read_interactions(make_log("aa", pd.Categorical([7, 8]), [1, 2]))["item_id"].tolist() == ["7", "8"]

    def test_faulty_sources(self, tmp_path, monkeypatch):
        log = make_log("a", "x", [1])
        with pytest.raises(ValueError, match=r"the DataFrame lacks the columns \['movie'\] and has \['user_id'"):
            read_interactions(log, item_column="movie")
        with pytest.raises(ValueError, match="the DataFrame has no rows"):
            read_interactions(log[:0])
        with pytest.raises(ValueError, match="the DatasetDict cannot be read: it must be a DataFrame, one Dataset"):
            read_interactions(DatasetDict(train=Dataset.from_pandas(log)))
        for suffix in ("csv", "parquet", "json"):
            with pytest.raises(ValueError, match=rf"log\.{suffix} cannot be read: .*Check its path"):
                read_interactions(tmp_path / f"log.{suffix}")

        (tmp_path / "log.xlsx").touch()
        with pytest.raises(ValueError, match=r"log\.xlsx cannot be read: its format is not known: it must be \.csv"):
            read_interactions(str(tmp_path / "log.xlsx"))
        for name in ("log.tsv.gz", "./log", "a/b/c"):
            with pytest.raises(ValueError, match=f"{name} cannot be read: No such file"):
                read_interactions(name)

        def not_found(name, split):
            raise FileNotFoundError(f"no dataset {name}")

        monkeypatch.setattr(tables, "load_dataset", not_found)
        with pytest.raises(
            ValueError, match="someone/typo cannot be read: it is not a file, .*: no dataset someone/typo"
        ):
            read_interactions("someone/typo")

    def test_surplus_cells_do_not_shift_the_columns(self, tmp_path):
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\na,1,2,3\n")  # pandas would read user 1, item 2
        with pytest.raises(ValueError, match="more cells than its header"):
            read_interactions(tmp_path / "log.csv")


class TestKCore:
    def test_hand_derived_chain(self, caplog):
        # k=2: item z goes (1 row), so user c keeps 1 row and goes, so item y keeps 1 row and goes; a and b share x, w.
        log = make_log("aaabbcc", "xwyxwyz", range(7))
        caplog.set_level(logging.INFO, logger="trl_msl.data.interactions")
        core = k_core(log, k=2)
        assert list(zip(core["user_id"], core["item_id"], strict=True)) == [*zip("aabb", "xwxw", strict=True)]
        assert caplog.messages == ["2-core: 7 → 4 interactions, 3 → 2 users, 4 → 2 items."]

    @given(logs, st.integers(1, 4))
    def test_equals_slow_loop(self, log, k):
        rows = list(read_interactions(log).itertuples(index=False, name=None))
        while True:
            users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
            kept = [row for row in rows if users[row[0]] >= k and items[row[1]] >= k]
            if kept == rows:
                break
            rows = kept
        if rows:
            assert list(k_core(log, k).itertuples(index=False, name=None)) == rows
        else:
            with pytest.raises(ValueError, match=rf"`k` = {k} leaves none of {len(log)} interactions: lower it"):
                k_core(log, k)

    def test_k(self):
        with pytest.raises(ValueError, match="`k` is 0: it must be at least 1"):
            k_core(make_log("a", "x", [1]), k=0)


class TestSlidingWindows:
    def test_hand_derived(self, caplog):
        # a has 3 <= 3 items: one window. b has 5: 5 - 3 + 1 = 3 windows. c has one item and so no window.
        log = make_log("bbbbbaaac", "12345xyzq", [1, 2, 3, 4, 5, 1, 2, 2, 1])
        assert sliding_windows(log, window=3).to_list() == [
            {"user_id": "a", "item_ids": ["x", "y", "z"], "timestamp": 2},
            {"user_id": "b", "item_ids": ["1", "2", "3"], "timestamp": 3},
            {"user_id": "b", "item_ids": ["2", "3", "4"], "timestamp": 4},
            {"user_id": "b", "item_ids": ["3", "4", "5"], "timestamp": 5},
        ]
        assert caplog.messages == ["1 of 3 users have a single interaction and give no window."]

    @settings(max_examples=40)
    @given(logs, st.integers(2, 6))
    def test_equals_slow_loop(self, log, window):
        expected = []
        for user, rows in read_interactions(log).groupby("user_id", sort=True):
            items, times = rows["item_id"].tolist(), rows["timestamp"].tolist()
            first = min(window, len(items))
            for end in range(first, len(items) + 1):
                expected.append({"user_id": user, "item_ids": items[end - first : end], "timestamp": times[end - 1]})
        expected = [row for row in expected if len(row["item_ids"]) > 1]
        if expected:
            assert sliding_windows(log, window).to_list() == expected
        else:
            with pytest.raises(ValueError, match=r"None of \d users has 2 interactions"):
                sliding_windows(log, window)

    def test_fractional_timestamps_stay(self):
        windows = sliding_windows(make_log("aa", "xy", [1.5e9, 1.5e9 + 0.25]))
        assert windows[0]["timestamp"] == 1.5e9 + 0.25

    @pytest.mark.parametrize("window", [1, 0, -3])
    def test_window(self, window):
        with pytest.raises(ValueError, match=f"`window` is {window}: it must be at least 2"):
            sliding_windows(make_log("aa", "xy", [1, 2]), window)


class TestCoveringWindows:
    @settings(max_examples=60)
    @given(st.lists(st.integers(0, 2), min_size=4, max_size=60), st.integers(2, 6), st.integers(1, 3))
    def test_each_target_is_supervised_once(self, users, window, share):
        """Also of a sample of the windows, in which some of a user's are missing."""
        log = make_log(map(str, users), map(str, range(len(users))), range(len(users)))  # no item twice
        if max(Counter(users).values()) < 2:
            return
        windows = sliding_windows(log, window).sort("timestamp")
        windows = windows.select(range(0, len(windows), share))
        kept = covering_windows(windows)["item_ids"][:]
        supervised = Counter(item for items in kept for item in items[1:])
        assert [supervised[items[-1]] for items in windows["item_ids"]] == [1] * len(windows)
        assert kept == [items for items in windows["item_ids"] if items in kept]
        if share == 1:
            counts = Counter(windows["user_id"])
            assert Counter(covering_windows(windows)["user_id"]) == {
                user: -(-count // (window - 1)) for user, count in counts.items()
            }

    def test_an_item_that_was_bought_twice(self):
        """`b` after `x` is not `b` after `d`, nor is another user's."""
        rows = [("u", ["c", "d", "b"]), ("v", ["a", "x", "b"]), ("u", ["a", "x", "b"]), ("u", ["x", "b", "c"])]
        windows = Dataset.from_dict({"user_id": [user for user, _ in rows], "item_ids": [ids for _, ids in rows]})
        assert covering_windows(windows).to_list() == [windows[0], windows[1], windows[3]]


class TestSplitByTime:
    def test_hand_derived(self):
        windows = Dataset.from_dict({"user_id": list("abcdefghij"), "timestamp": [9, 1, 5, 5, 5, 2, 3, 4, 0, 8]})
        splits = split_by_time(windows, fractions=(0.5, 0.3, 0.2))
        # By time: i0 b1 f2 g3 h4 | c5 d5 e5 | j8 a9, where c, d and e keep their order.
        assert ["".join(splits[name][:]["user_id"]) for name in ("train", "validation", "test")] == [
            "ibfgh",
            "cde",
            "ja",
        ]

    @settings(max_examples=40)
    @given(st.lists(st.integers(0, 5), min_size=10, max_size=60))
    def test_partitions_the_windows_in_time_order(self, timestamps):
        windows = Dataset.from_dict({"row": list(range(len(timestamps))), "timestamp": timestamps})
        splits = split_by_time(windows)
        rows = [row for split in splits.values() for row in split[:]["row"]]
        assert rows == sorted(range(len(timestamps)), key=lambda row: timestamps[row])
        for name, fraction in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
            assert abs(len(splits[name]) - fraction * len(timestamps)) <= 1

    def test_close_fractional_timestamps_are_not_ties(self):  # a float32 would make them equal
        windows = Dataset.from_dict({"timestamp": [1.5e9 + 2.25, 1.5e9 + 1.25, 1.5e9 + 0.25]})
        splits = split_by_time(windows, fractions=(0.34, 0.33, 0.33))
        assert [split[0]["timestamp"] for split in splits.values()] == [1.5e9 + 0.25, 1.5e9 + 1.25, 1.5e9 + 2.25]

    @pytest.mark.parametrize(
        "fractions", [(0.8, 0.2), (0.8, 0.2, 0.0), (0.8, 0.3, -0.1), (0.8, 0.1, 0.2), (8, 1, 1), (0.8, np.nan, 0.1)]
    )
    def test_fractions(self, fractions):
        with pytest.raises(ValueError, match="`fractions` is .*: pass 3 positive numbers that sum to 1"):
            split_by_time(Dataset.from_dict({"timestamp": list(range(10))}), fractions)

    def test_empty_split_and_missing_column(self):
        # Cuts at 0.8 * 2 = 1.6 and 0.9 * 2 = 1.8 both round to 2.
        with pytest.raises(ValueError, match=r"2 windows leave \['validation', 'test'\] empty with .*'train': 0\.8"):
            split_by_time(Dataset.from_dict({"timestamp": [1, 2]}))
        with pytest.raises(ValueError, match=r"`windows` has no column 'timestamp' but \['when'\]"):
            split_by_time(Dataset.from_dict({"when": [1]}))
        with pytest.raises(ValueError, match="the windows: 'timestamp' must hold a number"):
            split_by_time(Dataset.from_dict({"timestamp": [1, None, 3]}))
