"""Which errors end a run, and which cost one submission its grade.

The idea: a full disk or a database that refuses would meet every other submission too, so it ends
the run. Any other error is taken to be caused by the one submission in hand.

`recorder.py` asks at each error that it catches.
"""

import errno

LONGEST = 200  # characters of an error
# What the operating system says of one file's name or kind, which another file may not have.
OF_ONE_NAME = {
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.EILSEQ,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
}


def stops(error: BaseException | None) -> bool:
    """Return whether an error, or an error under it, would meet every other submission too.

    >>> stops(OSError(errno.ENOSPC, "no space left")), stops(OSError(errno.EISDIR, "a folder"))
    (True, False)
    """
    from sqlalchemy.exc import OperationalError

    if error is None:
        return False
    under = error.__cause__ or error.__context__
    # An OSError of ours without a number repeats the error that it was raised from.
    if isinstance(error, OSError) and (error.errno is not None or under is None):
        return error.errno not in OF_ONE_NAME
    return isinstance(error, OperationalError) or stops(under)


def first_line(error: Exception) -> str:
    """Return the kind of an error, and the first line of what it says."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:LONGEST]}"
