"What files can do to their readers: every kind read right, and whatever is wrong with them said in one line. DDCL_FUZZ is the number of mutated files (2,000 here, 10,000 at night)."
import json, os, random, resource, string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

pa = pytest.importorskip("pyarrow")
import pyarrow.csv, pyarrow.parquet as pq

from ddcl_nb import sources
from ddcl_nb.sources import BadChoice, Block, Reservoir, Source, SourceError, open_source

FUZZ = int(os.environ.get("DDCL_FUZZ", 2000))

def whole(source, **options):
    "All rows of a source as one block."
    blocks = [b for b in source.blocks(**options) if len(b)]
    join = lambda name: None if getattr(blocks[0], name) is None else [x for b in blocks for x in getattr(b, name)]
    return Block(np.concatenate([b.rows for b in blocks]), None if source.text else np.concatenate([b.values for b in blocks]), join("texts"), join("ids"))

def error(path, *columns, kind=SourceError, encoding=None, **options):
    with pytest.raises(kind) as caught: whole(open_source(path, columns, encoding=encoding), **options)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(path.name) and str(path.parent) not in line and len(line) < 600
    return line

# every kind of file gives the same rows

def written(folder, kind, table):
    path = folder / f"table.{kind}"
    match kind:
        case "csv" | "tsv": pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter="," if kind == "csv" else "\t"))
        case "jsonl": path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist()), encoding="utf-8")
        case "parquet": pq.write_table(table, path, row_group_size=700)
    return path

@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_the_same_table_in_every_format(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sources, "ROWS_PER_BLOCK", 512)
    rng = np.random.default_rng(0)
    numbers, texts = rng.normal(size=(2500, 2)), [f"row {i}, “quoted”, a \"quote\"\nand a line, Ünïcode 日本" for i in range(2500)]
    path = written(tmp_path, kind, pa.table({"key": [f"k{i}" for i in range(2500)], "a": numbers[:, 0], "body": texts, "b": numbers[:, 1]}))
    found = whole(source := open_source(path, ["a", "b"], id_column="key"))
    np.testing.assert_allclose(found.values, numbers, rtol=1e-14); np.testing.assert_array_equal(found.rows, np.arange(2500))
    assert found.ids == [f"k{i}" for i in range(2500)] and source.left_out == ("body",)
    automatic = open_source(path)
    assert automatic.text and automatic.columns == ("body",) and whole(automatic).texts == texts
    again = whole(automatic)
    assert again.texts == texts, "a source can be read again"

@pytest.mark.parametrize("dtype, order", [(np.float32, "C"), (np.float64, "F"), (np.float16, "C"), (np.int32, "F"), (bool, "C"), (">f8", "C"), (np.uint64, "F")])
def test_arrays_of_every_kind(tmp_path, monkeypatch, dtype, order):
    monkeypatch.setattr(sources, "NUMBERS_PER_BLOCK", 100)
    array = np.asarray(np.random.default_rng(0).integers(0, 2, size=(101, 7)), dtype=dtype, order=order)
    np.save(tmp_path / "x.npy", array)
    source = open_source(tmp_path / "x.npy")
    found = whole(source)
    np.testing.assert_array_equal(found.values, array.astype(float))
    assert source.length == 101 and found.values.dtype == (np.float32 if np.dtype(dtype).kind == "f" and np.dtype(dtype).itemsize < 8 else np.float64)

def test_reading_an_array_does_not_hold_it(tmp_path):
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float32, (2_000_000, 50)).flush()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = sum(len(block) for block in open_source(tmp_path / "big.npy").blocks())
    assert rows == 2_000_000 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # of 400 MB

@given(st.lists(st.text(alphabet=st.characters(exclude_characters="\x00\r", exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=20))
def test_any_text_comes_back_from_json_lines_and_parquet(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("texts")
    table = pa.table({"text": [*texts, "some words that make it a document"], "n": list(range(len(texts) + 1))})
    for kind in ("jsonl", "parquet"):
        assert whole(open_source(written(folder, kind, table), ["text"])).texts == table["text"].to_pylist()

# what is found without being named

def test_columns_that_are_found(tmp_path):
    write = lambda text: (tmp_path / "t.csv").write_text(text) and open_source(tmp_path / "t.csv")
    assert write("id,x,y\n0,1.5,2\n1,2.5,2\n2,3.5,2\n").columns == ("x", "y")
    assert write("id,x\n5,1.5\n9,2.5\n2,3.5\n").columns == ("id", "x"), "only a column that counts the rows is left out"
    assert write("x;y\n1;2\n").columns == ("x", "y") and write("x\ty\n1\t2\n").columns == ("x", "y")
    assert write("\ufeffx,y\n1,2\n").columns == ("x", "y"), "a byte order mark is no part of a name"
    assert write("1,2\n3,4\n").columns == ("column 0", "column 1")
    assert write("name,comment\nAda,a b\nBo,one two three four five six\n").columns == ("comment",)
    assert "which column holds the texts: text, body" in error(_file(tmp_path, "t.csv", "text,body\na,b\n"), kind=BadChoice)
    assert open_source(tmp_path / "t.csv", ["body"]).columns == ("body",)
    assert "no column of numbers or of texts among name" in error(_file(tmp_path, "t.csv", "name\nAda\nBo\n"))

def _file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path

# what is wrong, said with row and column

WRONG = {
    "ragged.csv": ("a,b\n1,2\n3\n", "ragged.csv: row 1: expected 2 columns, got 1: 3"),
    "missing.csv": ("a,b\n1,2\n3,\n", "missing.csv: row 1, column 'b': no number"),
    "nan.csv": ("a,b\n1,nan\n3,1\n", "nan.csv: row 0, column 'b': no number"),
    "inf.csv": ("a,b\n1,2\n3,-inf\n", "inf.csv: row 1, column 'b': infinite"),
    "twice.csv": ("a,a\n1,2\n", "twice.csv: column 'a' occurs twice"),
    "empty.csv": ("", "empty.csv: is empty"),
    "blank.csv": ("\n\n", "blank.csv: its first line is empty"),
    "header.csv": ("a,b\n", "header.csv: holds a header and no rows"),
    "utf16.csv": ("a,b\n1,2\n".encode("utf-16-le"), "utf16.csv: is not UTF-8 text; name its encoding by --encoding, such as cp1252 or latin-1"),
    "half.csv": ("a,b\n1,2\n".encode("utf-16")[:-1], "half.csv: is not utf-16 ("),
    "half.jsonl": ('{"a": 1}\n{"a": 2}\n'.encode("utf-16")[:-1], "half.jsonl: is not utf-16 ("),
    "latin.csv": ("text,n\nonce upon a time,1\n".encode() + "é\n".encode("latin-1"), "latin.csv: row 1: expected 2 columns"),
    "latin1.csv": ("text,n\nonce upon a time,1\n".encode() + "été,2\n".encode("latin-1"), "latin1.csv: row 1, column 'text': is not UTF-8"),
    "null.jsonl": ('{"a": 1}\n{"a": null}\n', "null.jsonl: row 1, column 'a': no number"),
    "gone.jsonl": ('{"a": 1}\n{"b": 2}\n{"a": 1}\n', "gone.jsonl: row 0, column 'b': no number"),
    "word.jsonl": ('{"a": 1}\n' * 1500 + '{"a": "x"}\n', "word.jsonl: row 1500, column 'a': must be a number, got 'x'"),
    "text.jsonl": ('{"text": "a b"}\n' * 1500 + '{"text": 7}\n', "text.jsonl: row 1500, column 'text': must be text, got '7'"),
    "cut.jsonl": ('{"a": 1}\n{"a": 1', "cut.jsonl: row 1: is not JSON"),
    "list.jsonl": ("[1, 2]\n", "list.jsonl: row 0: must be an object"),
    "latin.jsonl": (b'{"a": 1}\n{"a": "\xe9"}\n', "latin.jsonl: row 1: is not UTF-8"),
    "deep.jsonl": ("[" * 200_000, "deep.jsonl: row 0: is not JSON"),
    "digits.jsonl": ('{"a": ' + "9" * 9999 + "}\n", "digits.jsonl: row 0: is not JSON"),
    "huge.jsonl": ('{"a": 1' + "0" * 400 + "}\n", "huge.jsonl: row 0, column 'a': infinite"),
    "blank.jsonl": ("\n \n", "blank.jsonl: is empty"),
    "cut.parquet": (b"PAR1 and no more", "cut.parquet: cannot be read"),
    "not.npy": (b"PK\x03\x04 something else", "not.npy: is not a .npy file"),
    "cut.npy": (b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order'", "cut.npy: cannot be read"),
    "model.pkl": (b"\x80\x04.", "model.pkl: files that end in '.pkl' are not read"),
    "noname": ("a", "noname: files that end in 'nothing' are not read"),
}

@pytest.mark.parametrize("name", WRONG)
def test_one_line_that_names_file_row_and_column(tmp_path, name):
    content, line = WRONG[name]
    assert error(_file(tmp_path, name, content)).startswith(line)

CODED = [("utf-8-sig", None), ("utf-16", None), ("utf-32", None), ("utf-16-le", "utf-16-le"), ("utf-16-be", "UTF-16BE"), ("cp1252", "cp1252"), ("latin-1", "latin-1"), ("cp1250", "windows-1250"), ("shift_jis", "sjis"), ("utf-8", "utf8")]

@pytest.mark.parametrize("encoding, asked", CODED, ids=[encoding for encoding, _ in CODED])
def test_text_in_other_encodings(tmp_path, monkeypatch, encoding, asked):
    monkeypatch.setattr(sources, "ROWS_PER_BLOCK", 512)
    words = "ソースを 読む これは 文" if "jis" in encoding else "Él dice que no" if "1250" not in encoding else "Příliš žluťoučký kůň úpěl"
    texts = [f"{words} {i}, \"quoted\"" for i in range(1500)]
    table = pa.table({"text": texts, "n": list(range(1500))})
    for kind in ("csv", "tsv", "jsonl"):
        path = written(tmp_path, kind, table)
        path.write_bytes(path.read_bytes().decode().encode(encoding))
        assert whole(open_source(path, ["text"], encoding=asked)).texts == texts
        np.testing.assert_array_equal(whole(open_source(path, ["n"], encoding=asked)).values[:, 0], np.arange(1500))
    (tmp_path / "folder").mkdir(); (tmp_path / "folder" / "a.txt").write_bytes(words.encode(encoding))
    assert whole(open_source(tmp_path / "folder", encoding=asked)).texts == [words]

def test_an_encoding_that_is_wrong_or_of_no_use(tmp_path):
    path = _file(tmp_path, "t.csv", "text,n\nonce upon a time,1\n" + "x" * 70_000 + "\n" + "été,2\n")
    with pytest.raises(BadChoice, match="--encoding: no text encoding 'klingon'; usual ones are"): open_source(path, encoding="klingon")
    with pytest.raises(SourceError, match="^t.csv: is not ascii \\(ordinal not in range"): whole(open_source(path, ["text"], encoding="ascii"))
    with pytest.raises(SourceError, match="^t.csv: is not"): whole(open_source(path, ["text"], encoding="utf-16-le"))
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    with pytest.raises(BadChoice, match="x.npy: --encoding is for text"): open_source(tmp_path / "x.npy", encoding="cp1252")

def test_rows_that_lack_a_number_may_be_left_out(tmp_path):
    path = _file(tmp_path, "t.csv", "name,a,b\nx,1,2\ny,,3\nz,4,inf\nw,5,6\n")
    found = whole(open_source(path, id_column="name"), skip_missing=True)
    assert found.rows.tolist() == [0, 3] and found.ids == ["x", "w"] and found.values.tolist() == [[1, 2], [5, 6]]

def test_arrays_that_are_not_rows_of_numbers(tmp_path):
    for array, message in ((np.zeros(3), "of shape (3,)"), (np.zeros((3, 0)), "(3, 0)"), (np.zeros((2, 2), complex), "complex128"), (np.array([["a"]]), "<U1"), (np.zeros((2, 2, 2)), "(2, 2, 2)")):
        np.save(tmp_path / "x.npy", array)
        assert message in error(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([[print]], dtype=object), allow_pickle=True)
    assert "Python objects" in error(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.ones((100, 3)))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-9])
    assert "cannot be read" in error(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.array([[1, 2], [3, np.nan]]))
    assert "row 1, column 'column 1': no number" in error(tmp_path / "x.npy")
    assert "no named columns" in error(tmp_path / "x.npy", "a", kind=BadChoice)

def test_a_line_without_an_end_is_refused_before_it_fills_the_memory(tmp_path):
    for name, start in (("long.jsonl", b'{"text": "'), ("long.csv", b'text\n"')):
        with open(tmp_path / name, "wb") as file:
            file.write(start)
            file.truncate(2**30)  # the rest are zeros that lie on no disk
        for encoding in (None, "cp1252"):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            line = error(tmp_path / name, encoding=encoding)
            assert "16 MB" in line and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000

def test_folders_of_texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    assert "the folder holds no files ending in .txt" in error(folder)
    for name in ("b.txt", "a/c.md", "a/.hidden.txt", ".git/x.txt", "z.bin"):
        (folder / name).parent.mkdir(exist_ok=True); (folder / name).write_text(f"the text of {name}")
    (folder / "a" / "up").symlink_to(folder)  # a folder that contains itself
    found = whole(open_source(folder))
    assert found.ids == ["a/c.md", "b.txt"] and found.texts == ["the text of a/c.md", "the text of b.txt"]
    (folder / "d.txt").write_bytes(b"caf\xe9")
    assert error(folder) == "texts/d.txt: is not UTF-8 (byte 0xe9 at 3); name its encoding by --encoding, such as cp1252 or latin-1"
    assert whole(open_source(folder, encoding="latin-1")).texts[-1] == "café"
    (folder / "d.txt").unlink(); (folder / "loop.txt").symlink_to("loop.txt")
    assert error(folder) == "texts/loop.txt: cannot be read (too many levels of symbolic links)"
    (folder / "loop.txt").unlink(); os.mkfifo(folder / "pipe.txt")
    assert error(folder) == "texts/pipe.txt: is not a file"

def test_links_that_lead_nowhere_and_things_that_are_no_files(tmp_path):
    (tmp_path / "self.csv").symlink_to("self.csv"); (tmp_path / "gone.csv").symlink_to("nowhere"); os.mkfifo(tmp_path / "pipe.csv")
    assert error(tmp_path / "self.csv") == "self.csv: cannot be read (too many levels of symbolic links)"
    assert error(tmp_path / "gone.csv") == "gone.csv: cannot be read (no such file or directory)"
    assert error(tmp_path / "pipe.csv") == "pipe.csv: is not a file"

def test_a_touched_file_has_another_stamp(tmp_path):
    path = _file(tmp_path, "t.csv", "a\n1\n2\n3\n")
    source = open_source(path)
    first = source.stamp()
    assert source.stamp() == first
    path.write_text("a\n1\n2\n4\n"); os.utime(path, ns=(1, 1))
    assert source.stamp() != first

# samples

@given(st.integers(1, 50), st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 100))
def test_a_sample_does_not_depend_on_the_blocks(size, cuts, seed):
    keys = np.random.default_rng(seed).random(sum(cuts))
    one, many, start = Reservoir(size), Reservoir(size), 0
    one.add(keys, np.arange(len(keys)))
    for n in cuts:
        many.add(keys[start:start + n], np.arange(start, start + n)); start += n
    if len(keys):
        expected = np.sort(np.argsort(keys)[:size])
        np.testing.assert_array_equal(one.take()[1], expected); np.testing.assert_array_equal(many.take()[1], expected)

# mutated files

def seeds(folder):
    rng = np.random.default_rng(0)
    table = pa.table({"id": list(range(40)), "a": rng.normal(size=40), "text": [f"some words that make a document {i}" for i in range(40)], "b": rng.integers(0, 9, 40)})
    np.save(folder / "table.npy", rng.normal(size=(30, 3)))
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt").write_text("once upon a time, été")
    return [written(folder, kind, table).read_bytes() for kind in ("csv", "jsonl", "parquet")] + [(folder / "table.npy").read_bytes(), "once upon a time, été".encode()]

def mutated(content, rng):
    "A few random changes: flipped bits, other bytes, parts cut out, moved or doubled, a cut end, something foreign."
    content = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        j = min(j, i + rng.choice([1, 4, 64, 10**6]))
        match rng.randrange(7):
            case 0 if i < len(content): content[i] ^= 1 << rng.randrange(8)
            case 1: content[i:j] = rng.randbytes(j - i)
            case 2: del content[i:j]
            case 3: content[i:i] = content[i:j]
            case 4: del content[i:]
            case 5: content[i:i] = rng.choice([b"\0", b"\xff\xfe", b'"', b",", b"\n", b"nan", b"-1e999", b"{", b"]", b"9" * 500, "\u2028".encode(), b"\r"])
            case _: content[i:j] = bytes(j - i)
    return bytes(content)

def test_no_mutated_file_breaks_its_reader(tmp_path):
    rng, refused, reference = random.Random(0), {}, {}
    limits = resource.getrlimit(resource.RLIMIT_AS)
    names = ["table.csv", "table.jsonl", "table.parquet", "table.npy", "texts"]
    originals = dict(zip(names, seeds(tmp_path)))
    for count in range(FUZZ):
        name = names[count % len(names)]
        path = tmp_path / name
        (path / "a.txt" if name == "texts" else path).write_bytes(content := mutated(originals[name], rng))
        columns = [(), (), ["a", "b"], ["text"]][rng.randrange(4)] if name in names[:3] else ()
        encoding = rng.choice([None] * 6 + ["utf-16", "cp1252", "ascii", "utf-7"]) if name in ("table.csv", "table.jsonl", "texts") else None
        try:
            source = open_source(path, columns, id_column="id" if columns and rng.random() < 0.5 else None, encoding=encoding)
            for block in source.blocks(skip_missing=rng.random() < 0.5):
                assert source.text or np.isfinite(block.values).all() and block.values.shape[1] == len(source.columns)
        except SourceError as error:
            line = str(error)
            assert "\n" not in line and name in line and len(line) < 1000, (count, line)
            refused[name] = refused.get(name, 0) + 1
        except Exception as other:
            raise AssertionError(f"mutation {count} of {name} ({columns}): {type(other).__name__}: {other}; {content[:300]!r}") from other
    assert set(refused) == set(names)
