"""Finding papers: words, field synonyms, Chinese, typing errors, filters. Never imports torch.

A query is matched in three ways, and the scores are added:

    names      the query is, begins or contains a work's name, alias or slug
    words      every word of the query against every word of the cards, weighted by field and rarity; unknown words are
               completed ("segm") or mended ("detecton")
    concepts   phrases of the vocabulary (tasks, methods, areas; with synonyms, English and Chinese) that the query contains,
               or that contain the query: all works filed under them

Works that others build on, and works with code, come first among equals. The index is built once from the cards and kept in
the cache folder; the site's search (web/src/search.ts) is the same algorithm.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from paperzoo.catalog import cards
from paperzoo.catalog.cards import Paper, papers, plain, variants

FIELDS = {
    "name": 6.0,
    "aliases": 6.0,
    "title": 4.0,
    "keywords": 4.0,
    "task": 3.0,
    "authors": 3.0,
    "summary": 2.0,
    "summary_zh": 2.0,
    "venue": 2.0,
    "data": 1.5,
    "mechanism": 1.2,
}
STOP = set(
    "a an and are as at by can do for from how i in into is it me my of on or that the this to use using via what which with".split()
)
STOP |= set("paper papers method methods model models network networks neural deep learning based".split())
CJK = re.compile(r"[\u3400-\u9fff]+")
WORD = re.compile(r"[a-z0-9]+|[\u3400-\u9fff]+")


# -- words -------------------------------------------------------------------------------------------------------------


def plain_text(text: str) -> str:
    """Lower case, compatible forms, without accents."""
    text = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in text if not unicodedata.combining(c))


@functools.lru_cache(maxsize=50_000)
def stem(word: str) -> str:
    """One form for plural and singular, British and American: colours -> color, optimization -> optimisation."""
    if word.isdigit() or len(word) < 4:
        return word
    word = word.replace("our", "or").replace("ll", "l")
    word = re.sub(r"(?<=[a-z])(i|y)z(?=e|a|i)", r"\1s", word)
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def tokens(text: str) -> list[str]:
    """Words as they are indexed: stems; Chinese in pairs of characters."""
    found = []
    for part in WORD.findall(plain_text(text)):
        if CJK.match(part):
            found += [part[i : i + 2] for i in range(len(part) - 1)] if len(part) > 1 else [part]
        else:
            found.append(stem(part))
    return found


# -- the index ---------------------------------------------------------------------------------------------------------


def build_index() -> dict[str, Any]:
    """Postings, phrases and priors of all cards, as plain data: what `rank` needs."""
    from paperzoo.catalog import vocabulary
    from paperzoo.catalog.relations import compares_with, used_by

    found = list(papers().values())
    postings: dict[str, dict[int, float]] = {}
    names: dict[str, list[int]] = {}
    members: dict[str, list[float]] = {}
    priors = []
    for number, paper in enumerate(found):
        for term, weight in weigh(document(paper)).items():
            postings.setdefault(term, {})[number] = round(weight, 2)
        for name in {paper.slug, paper.card["name"], *paper.card.get("aliases", [])}:
            names.setdefault(plain(plain_text(name)), []).append(number)
        for key, weight in filed_under(paper):
            members.setdefault(key, []).extend((number, weight))
        known = math.log1p(len(used_by(paper.slug)) + 0.5 * len(compares_with(paper.slug)))
        coded = 2.0 if paper.has_code else 0.0
        reading = paper.card["kind"] == "reading"
        priors.append(round(known + coded + 0.3 * bool(paper.card.get("headline")) - 0.7 * reading, 2))
    phrases = {}
    for kind in ("tasks", "methods", "areas"):
        for term in vocabulary.table(kind).values():
            if f"{kind}:{term.id}" in members:
                for spelling in term.spellings:
                    phrases.setdefault(" ".join(tokens(spelling)) or spelling, []).append(f"{kind}:{term.id}")
    return {
        "slugs": [p.slug for p in found],
        "priors": priors,
        "postings": {t: [x for pair in docs.items() for x in pair] for t, docs in postings.items()},
        "names": names,
        "members": members,
        "phrases": phrases,
    }


def document(paper: Paper) -> dict[str, str]:
    card = paper.card
    lists = {k: " ".join(card.get(k) or []) for k in ("aliases", "keywords", "authors")}
    data = " ".join(row["dataset"] for row in card.get("headline", []))
    text = {k: card.get(k) or "" for k in FIELDS if k not in lists and k != "data"}
    text["name"] += " " + paper.slug.replace("_", " ")
    text["venue"] += f" {card['year']}"
    return text | lists | {"data": data}


def weigh(fields: dict[str, str]) -> dict[str, float]:
    """term -> the weight of its best field, and a little for each other field it stands in."""
    weights: dict[str, float] = {}
    for field, text in fields.items():
        for term in set(tokens(text)):
            old, new = weights.get(term, 0.0), FIELDS[field]
            weights[term] = max(old, new) + 0.25 * min(old, new)
    return weights


def filed_under(paper: Paper) -> list[tuple[str, float]]:
    tasks = [(f"tasks:{t}", 1.0 if i == 0 else 0.7) for i, t in enumerate(paper.card["tasks"])]
    methods = [(f"methods:{m}", 0.6 if i == 0 else 0.45) for i, m in enumerate(paper.card.get("methods", []))]
    return [*tasks, *methods, (f"areas:{paper.area}", 0.5)]


@functools.cache
def index() -> dict[str, Any]:
    """The index of today's cards, from the cache folder if it is still true."""
    from paperzoo.catalog import vocabulary

    stamps = [[str(f), f.stat().st_mtime_ns] for f in (*sorted(vocabulary.FOLDER.glob("*.toml")), Path(__file__))]
    seen = json.dumps([cards.fingerprint(cards.known_files()), stamps])
    key = f"{len(seen)}-{zlib.crc32(seen.encode())}-{zlib.adler32(seen.encode())}"
    file = cards.cache_folder() / "search.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(file.read_bytes())
        if stored["key"] == key:
            return stored
    built = build_index() | {"key": key}
    with contextlib.suppress(OSError):  # the file only saves time
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(built, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
        part.replace(file)
    return built


# -- ranking -----------------------------------------------------------------------------------------------------------


def rank(data: dict[str, Any], query: str) -> list[tuple[int, float]]:
    """(number of the work, score), best first; works that match nothing are left out."""
    words = [w for w in dict.fromkeys(tokens(query)) if w not in STOP] or list(dict.fromkeys(tokens(query)))
    if not words:
        return []
    count = len(data["slugs"])
    scores: dict[int, float] = {}
    covered: dict[int, set[int]] = {}
    for place, word in enumerate(words):
        best: dict[int, float] = {}
        for term, quality in matches(data["postings"], word, len(words) == place + 1):
            docs = data["postings"][term]
            rarity = math.log(1 + count / (len(docs) / 2)) / math.log(1 + count)
            for number, weight in zip(docs[::2], docs[1::2], strict=True):
                best[number] = max(best.get(number, 0.0), weight * rarity * quality)
        for number, score in best.items():
            scores[number] = scores.get(number, 0.0) + score
            covered.setdefault(number, set()).add(place)
    for key, (strength, places) in concepts(data["phrases"], query, words).items():
        for number, weight in zip(data["members"][key][::2], data["members"][key][1::2], strict=True):
            scores[number] = scores.get(number, 0.0) + 9 * strength * weight * len(places) ** 0.5
            covered.setdefault(number, set()).update(places)
    for number, bonus in named(data["names"], query, words).items():
        scores[number] = scores.get(number, 0.0) + bonus
        covered.setdefault(number, set()).update(range(len(words)))
    for number, score in scores.items():
        share = len(covered[number]) / len(words)
        scores[number] = score * (0.2 + 0.8 * share**1.5) * (1 + 0.15 * data["priors"][number])
    return sorted(scores.items(), key=lambda item: (-item[1], data["slugs"][item[0]]))


def matches(postings: dict[str, list], word: str, last: bool) -> list[tuple[str, float]]:
    """(indexed term, quality): the word itself; as the last one also what it begins; else the nearest spellings."""
    found = [(word, 1.0)] if word in postings else []
    if CJK.match(word) and len(word) == 1:  # pairs are indexed; one character alone is looked for in them
        return [(t, 0.7) for t in postings if word in t]
    ascii_word = word.isascii()
    if ascii_word and len(word) >= (3 if not found else 5) and last:
        found += [(t, 0.6) for t in postings if t.startswith(word) and t != word]
    if not found and ascii_word and len(word) >= 4 and not word.isdigit():
        reach = 1 if len(word) < 7 else 2
        near = [(distance(word, t, reach), t) for t in postings if abs(len(t) - len(word)) <= reach and t.isascii()]
        closest = min((d for d, _ in near), default=reach + 1)
        found = [(t, 0.8 - 0.15 * d) for d, t in near if d == closest and d <= reach]
    return found


def distance(a: str, b: str, most: int) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours from a to b; most + 1 when there are more."""
    if a[0] != b[0] and a[1:2] != b[1:2] and a[0] != b[1:2]:
        return most + 1
    before, row = [], list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
        if min(row) > most:
            return most + 1
    return row[-1]


def concepts(phrases: dict[str, list[str]], query: str, words: list[str]) -> dict[str, tuple[float, set[int]]]:
    """concept -> (strength in 0..1, the places of the query's words that it explains)."""
    wanted = {w: i for i, w in enumerate(words)}
    found: dict[str, tuple[float, set[int]]] = {}
    for phrase, keys in phrases.items():
        parts = set(phrase.split())
        hit = parts & wanted.keys()
        if not hit:
            continue
        if len(hit) == len(parts):
            strength = 1.0
        elif len(hit) == len(wanted) and (len(hit) > 1 or not next(iter(hit)).isascii()):
            strength = (len(hit) / len(parts)) ** 0.5
        elif len(hit) > 1:
            strength = 0.6 * len(hit) / len(parts)
        else:
            continue
        strength *= 0.4 + 0.6 * len(hit) / len(wanted)
        for key in keys:
            old = found.get(key, (0.0, set()))
            found[key] = (max(strength, old[0]), old[1] | {wanted[w] for w in hit})
    return found


def named(names: dict[str, list[int]], query: str, words: list[str]) -> dict[int, float]:
    """Works whose name the query is, begins, or contains."""
    whole = plain(plain_text(query))
    found: dict[int, float] = {}
    for name, numbers in names.items():
        if name == whole:
            bonus = 100.0
        elif len(whole) >= 4 and name.startswith(whole):
            bonus = 12.0
        elif name in words and len(name) > 2:
            bonus = 15.0
        else:
            continue
        for number in numbers:
            found[number] = max(found.get(number, 0.0), bonus)
    return found


def search(query: str, limit: int | None = 20, among: Iterable[Paper] | None = None) -> list[Paper]:
    """Papers that match the words of a query, English or Chinese, best first; only those in `among`, if given.

    One slug, name or title typed in full comes first. An empty query finds nothing.
    """
    data = index()
    allowed = None if among is None else {p.slug for p in among}
    found = []
    for number, _ in rank(data, query):
        slug = data["slugs"][number]
        if allowed is None or slug in allowed:
            found.append(papers()[slug])
            if limit and len(found) == limit:
                break
    return found


# -- lists -------------------------------------------------------------------------------------------------------------


def list_models(pattern: str = "*") -> list[str]:
    """The names that `create` takes, those that match a pattern such as "resnet*"."""
    return sorted(fnmatch.filter(variants(), pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"))
