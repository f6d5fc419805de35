"""pytest tests/test_citations.py"""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [*sorted(ROOT.glob("*.py")), *ROOT.glob("*.md"), *ROOT.glob("*.flags"),
         *sorted(path for folder in ("scenes", "experiments", "cuda_attention")
                 for path in (ROOT / folder).glob("*.py"))]

# {kind: {what stands before the last dot: the highest number after it}}; all count from 1.
PAPER = {                                                               # arXiv 2605.06548
    "Eq": {"3": 35, "5": 2, "8": 19, "9": 41, "10": 25, "11": 23, "12": 19, "13": 15, "14": 28,
           "15": 38, "16": 10},
    "Sec": {"": 17, "2": 3, "3": 3, "3.1": 2, "3.2": 3, "3.3": 2, "4": 5, "4.4": 2, "5": 5, "8": 4,
            "9": 5, "10": 4, "11": 5, "12": 4, "14": 4, "14.1": 2, "14.2": 2, "14.3": 2, "14.4": 3,
            "15": 5, "16": 9, "17": 2, "17.2": 3},
    "Tab": {"": 10}, "Fig": {"": 31}, "Alg": {"": 2, "A": 2}}
BLOG = {"Sec": {"": 6, "4": 3}, "Fig": {"": 2}}

NUMBER = r"(?!\d{4}\.)(?:A\.)?\d+(?:\.\d+)*"              # not 2211.09800, of arXiv
CITATION = (r"\b(Eq|[Ss]ec|Tab|Fig|Alg)(?:uation|tion|le|ure|orithm)?s?\.? "
            rf"({NUMBER}(?:(?:, | and | ?[-–] ?){NUMBER})*)")
# What stands before a citation of another paper: 2211.09800, Eq. 5; Esser et al., Eq. 5; SD3, Eq. 5
OTHER = r"(\d{4}\.\d{4,5}|\bal\.|\b[A-Z][\w-]*(?='s|,))('s|,)? $"


def citations(text):
    """(paper or blog, kind, number) of each citation; those of other papers are left out."""
    text = re.sub(r"\s*\n[ #]*", " ", text)                 # across line breaks, in comments too
    source, end = "", 0
    for found in re.finditer(CITATION, text):
        if not re.fullmatch(r"[,;]? (and )?", text[end:found.start()]):    # else the source stays
            before = text[:found.start()][-80:]
            source = "blog" if re.search(r"\bblog('s)?,? $", before) else \
                "other" if re.search(OTHER, before) else "paper"
        end = found.end()
        if source != "other":
            yield from ((source, found[1].title(), n) for n in re.findall(NUMBER, found[2]))


def exists(source, kind, number):
    before, _, last = number.rpartition(".")
    highest = {"paper": PAPER, "blog": BLOG}[source].get(kind, {}).get(before, 0)
    return 1 <= int(last) <= highest


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_a_file_cites_exists(path):
    assert [cited for cited in citations(path.read_text()) if not exists(*cited)] == []


def test_citations_of_every_form_are_found():
    assert sum(1 for path in FILES for _ in citations(path.read_text())) > 60
    right = """the flow (paper, Eq. 9.31-9.34, 10.2; blog, Sec. 3), Table 5, 2210.02747, and
        # Fig. 3 and 16, the blog's Figure 2 (Algorithm A.1, Eq. 10.12 - 10.14), blog, section
        # 4.1 (Sec. 17.2.3) not SD3, Eq. 5, Table 77, 2403.03206, Sec. 91, nor Esser et al., Eq. 7,
        # DiT's Fig. 9"""
    assert [" ".join(cited) for cited in citations(right)] == [
        "paper Eq 9.31", "paper Eq 9.34", "paper Eq 10.2", "blog Sec 3", "paper Tab 5",
        "paper Fig 3", "paper Fig 16", "blog Fig 2", "paper Alg A.1", "paper Eq 10.12",
        "paper Eq 10.14", "blog Sec 4.1", "paper Sec 17.2.3"]
    wrong = "Eq. 3.99, 3.36, 4.1, 9.0, Table 42, Sec. 3.1.3, 18, Algorithm A.3, blog, section 7"
    assert [exists(*cited) for cited in citations(wrong)] == [False] * 9
