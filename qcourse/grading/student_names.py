"""Names of students and files, which may hold any character: which can be kept, how to print them.

The idea: a student's name is the name of a folder. A gradebook keeps letters of all scripts and a
little punctuation; a report shows everything, with what cannot be printed spelled out.

`intake.py` collects the names.
"""

import unicodedata

PUNCTUATION = set("_.@+-'’(), ")  # besides letters, marks and digits of all scripts
LONGEST_NAME = 128  # characters that nbgrader's database has for a student's name


def name_problem(student: str) -> str:
    """Return why a gradebook cannot keep this name; "" if it can.

    >>> name_problem("Renée O'Neil"), name_problem("अदिति")
    ('', '')
    >>> name_problem("a;b")
    "is a folder with ';' (U+003B) in its name, which a gradebook cannot keep; rename it"
    """
    for letter in student:
        # L, M and N are Unicode's letters, marks and numbers.
        if letter in PUNCTUATION or unicodedata.category(letter)[0] in "LMN":
            continue
        code = f"U+{ord(letter):04X}"
        what = f"{letter!r} ({code})" if letter.isprintable() else code
        return f"is a folder with {what} in its name, which a gradebook cannot keep; rename it"
    if student != student.strip():
        return "is a folder whose name begins or ends with a space; rename it"
    if len(student) > LONGEST_NAME:
        return f"is a folder whose name is longer than {LONGEST_NAME} letters; rename it"
    return ""


def printable(text: str) -> str:
    """Return the text with every character that cannot be printed spelled out.

    >>> printable("a\\nb")
    'a\\\\nb'
    """
    letters = [letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text]
    return "".join(letters)
