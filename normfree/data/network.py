"""A question with a short answer: can that server be reached?

The libraries that download have no time limit (tiktoken) or retry for most of a minute (datasets). So they are called
only after this has said yes.
"""

import threading
import urllib.error
import urllib.request

SECONDS = 3.0


def reachable(url: str, seconds: float = SECONDS) -> bool:
    """Whether anything answers at `url` within `seconds`, through the proxy of the environment if there is one."""
    answered = threading.Event()

    def ask() -> None:
        try:
            # A new opener: the shared one keeps the proxies that the environment named when it was first used.
            urllib.request.build_opener().open(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer: the server is there
        except (OSError, ValueError):
            return
        answered.set()

    # A thread, because looking up a name cannot be given a time limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()
