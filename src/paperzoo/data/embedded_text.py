"""Text that is there on every machine: what Python's own library says about itself, and a small generated language pair.

    python_docs (labelled)    docstrings of the standard library with the family of the module they come from: real text
    python_docs (documents)   the same library file by file, for masked language modelling
    diary_en_zh (parallel)    English sentences and their Chinese, from a grammar with known answers

Docstrings are read from the source files without importing them, so nothing of the modules runs. Python versions differ a
little in their text; everything else is fixed.
"""

from __future__ import annotations

import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

FAMILIES = {
    "collections": "collections heapq bisect copy enum types dataclasses functools contextlib weakref abc typing operator"
    " reprlib pprint graphlib",
    "concurrency": "threading multiprocessing concurrent queue subprocess sched contextvars",
    "files": "os pathlib shutil tempfile glob fnmatch fileinput filecmp zipfile tarfile gzip bz2 lzma io posixpath"
    " genericpath ntpath stat mimetypes",
    "language": "ast inspect dis tokenize token symtable importlib pkgutil runpy zipimport code codeop compileall py_compile"
    " modulefinder pickle pickletools opcode keyword linecache",
    "networking": "socket socketserver ssl http urllib ftplib poplib imaplib smtplib xmlrpc ipaddress asyncio selectors"
    " webbrowser wsgiref",
    "numbers": "decimal _pydecimal fractions statistics random numbers datetime _pydatetime calendar colorsys zoneinfo",
    "testing": "unittest doctest pdb bdb traceback trace cProfile profile pstats timeit logging warnings",
    "text": "string textwrap difflib re codecs gettext locale csv json html xml email configparser tomllib plistlib"
    " argparse optparse getopt shlex",
}
SHORTEST = 8  # words of a docstring that is kept
PIECE = 1600  # characters of a document


def module_files(module: str) -> list[Path]:
    """The source files of a module or package of the standard library; none where this Python lacks it."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    if (folder / f"{module}.py").is_file():
        return [folder / f"{module}.py"]
    return sorted(p for p in (folder / module).rglob("*.py") if not {"test", "tests", "__pycache__"} & set(p.parts))


def docstrings(path: Path) -> list[str]:
    """The docstrings of a source file, in order, with the white space of each line joined."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners)]
    return [" ".join(text.split()) for text in found if text and len(text.split()) >= SHORTEST]


@lru_cache(maxsize=1)
def library() -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """(family, file, docstrings) of every file; a docstring that occurs twice is kept once."""
    seen: set[str] = set()
    files = []
    for family, modules in FAMILIES.items():
        for module in modules.split():
            for path in module_files(module):
                texts = [text for text in docstrings(path) if not (text in seen or seen.add(text))]
                if texts:
                    files.append((family, f"{module}/{path.name}", tuple(texts)))
    return tuple(files)


def is_test(key: str, one_in: int) -> bool:
    """A split that depends on the text alone, so another Python version moves nothing from one side to the other."""
    return zlib.crc32(key.encode()) % one_in == 0


def python_docs_labelled(split: str) -> list[tuple[str, str]]:
    """(docstring, family of its module), shuffled once; a fifth is for testing."""
    rows = [(text, family) for family, _, texts in library() for text in texts]
    rows = [row for row in rows if is_test(row[0], 5) == (split != "train")]
    random.Random(0).shuffle(rows)
    return rows


def python_docs_documents(split: str) -> list[str]:
    """The docstrings of a file joined, cut into pieces of about 1,600 characters; a tenth of the files is for testing."""
    pieces = []
    for _, name, texts in library():
        if is_test(name, 10) == (split != "train"):
            pieces += cut(texts)
    random.Random(0).shuffle(pieces)
    return pieces


def cut(texts: tuple[str, ...]) -> Iterator[str]:
    piece = ""
    for text in texts:
        piece = f"{piece} {text}" if piece else text
        while len(piece) >= PIECE:
            end = piece.rfind(" ", 0, PIECE)
            end = end if end > 0 else PIECE
            yield piece[:end]
            piece = piece[end:].strip()
    if len(piece) > PIECE // 4:
        yield piece


# -- a language pair with known answers --------------------------------------------------------------------------------

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
ONES = (ONES + " eighteen nineteen").split()
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DIGITS = "零一二三四五六七八九"
MONTHS = "January February March April May June July August September October November December".split()
PEOPLE = [("Anna", "安娜"), ("Peter", "彼得"), ("Mary", "玛丽"), ("David", "大卫"), ("Lucy", "露西"), ("Tom", "汤姆")]
PEOPLE += [
    ("my brother", "我哥哥"),
    ("her teacher", "她的老师"),
    ("our neighbour", "我们的邻居"),
    ("the doctor", "医生"),
]
VERBS = [
    ("bought", "买了"),
    ("sold", "卖了"),
    ("saw", "看见了"),
    ("found", "找到了"),
    ("lost", "丢了"),
    ("drew", "画了"),
]
THINGS = [  # one, many, the measure word that Chinese wants between number and thing
    *[("book", "books", "本", "书"), ("dictionary", "dictionaries", "本", "词典"), ("horse", "horses", "匹", "马")],
    *[("cat", "cats", "只", "猫"), ("bird", "birds", "只", "鸟"), ("car", "cars", "辆", "汽车")],
    *[("bicycle", "bicycles", "辆", "自行车"), ("ticket", "tickets", "张", "票"), ("map", "maps", "张", "地图")],
    *[("fish", "fish", "条", "鱼"), ("apple", "apples", "个", "苹果"), ("watermelon", "watermelons", "个", "西瓜")],
    *[("pen", "pens", "支", "笔"), ("umbrella", "umbrellas", "把", "雨伞"), ("chair", "chairs", "把", "椅子")],
]
PARTS_OF_DAY = [("in the morning", "早上", range(6, 12)), ("in the evening", "晚上", range(6, 12))]


def english_number(n: int) -> str:
    """1 … 999 in words: "three hundred and forty-two"."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    return f"{ONES[n // 100]} hundred" + (f" and {english_number(n % 100)}" if n % 100 else "")


def chinese_number(n: int) -> str:
    """1 … 999 in characters: 342 is 三百四十二, 305 is 三百零五, 12 is 十二."""
    if n < 10:
        return DIGITS[n]
    if n < 100:
        tens = "" if n < 20 else DIGITS[n // 10]
        return f"{tens}十{DIGITS[n % 10] if n % 10 else ''}"
    rest = n % 100
    if not rest:
        return f"{DIGITS[n // 100]}百"
    return f"{DIGITS[n // 100]}百" + (
        f"零{DIGITS[rest]}" if rest < 10 else f"{DIGITS[rest // 10]}十{DIGITS[rest % 10] if rest % 10 else ''}"
    )


def counted(n: int) -> str:
    """A number before a measure word: two alone is 两 there."""
    return "两" if n == 2 else chinese_number(n)


def clock(hour: int, quarter: int) -> tuple[str, str]:
    """Quarters of an hour: "a quarter to eight" is 七点三刻, so the hour changes between the languages."""
    now = f"{chinese_number(hour)}点"
    return [
        (f"at {ONES[hour]} o'clock", now),
        (f"at a quarter past {ONES[hour]}", f"{now}一刻"),
        (f"at half past {ONES[hour]}", f"{now}半"),
        (f"at a quarter to {ONES[hour % 12 + 1]}", f"{now}三刻"),
    ][quarter]


def diary_sentence(rng: random.Random) -> tuple[str, str]:
    """One sentence and its Chinese.

    English says who, what, and when last, day before month; Chinese who, when (largest unit first), what, with a measure
    word that depends on the thing: "Anna bought two books on 3 May 2014 at half past seven in the evening." is
    "安娜2014年5月3日晚上七点半买了两本书。"
    """
    person, verb, thing = rng.choice(PEOPLE), rng.choice(VERBS), rng.choice(THINGS)
    number = rng.choice([1, 2, rng.randint(3, 12), rng.randint(13, 99), rng.randint(100, 999)])
    year, month, day = rng.randint(2000, 2029), rng.randint(1, 12), rng.randint(1, 28)
    who = person[0][0].upper() + person[0][1:]
    english = f"{who} {verb[0]} {english_number(number)} {thing[0] if number == 1 else thing[1]}"
    english_when, chinese_when = f"on {day} {MONTHS[month - 1]} {year}", f"{year}年{month}月{day}日"
    if rng.random() < 0.6:
        part, hours = rng.choice([(p[0:2], p[2]) for p in PARTS_OF_DAY])
        english_time, chinese_time = clock(rng.choice(list(hours)), rng.randrange(4))
        english_when, chinese_when = (
            f"{english_when} {english_time} {part[0]}",
            f"{chinese_when}{part[1]}{chinese_time}",
        )
    return f"{english} {english_when}.", f"{person[1]}{chinese_when}{verb[1]}{counted(number)}{thing[2]}{thing[3]}。"


@lru_cache(maxsize=4)
def diary_en_zh(split: str, count: int | None = None, seed: int = 0) -> tuple[tuple[str, str], ...]:
    """Different sentences: 12,000 for training, 400 others for testing."""
    rng, pairs = random.Random(seed), {}
    while len(pairs) < 12_400:
        source, target = diary_sentence(rng)
        pairs[source] = target
    rows = list(pairs.items())
    rows = rows[400:] if split == "train" else rows[:400]
    return tuple(rows[:count])


LABELLED = {"python_docs": python_docs_labelled}
DOCUMENTS = {"python_docs": python_docs_documents}
PARALLEL = {"diary_en_zh": diary_en_zh}
