"""What a rehearsal has beside the real stages: cells that hang and crash, with sound ones before and behind them."""

import os
import resource
import signal


def hang(machine):
    def spin():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("spinning", flush=True)
        while True:
            pass

    return {"before": dict, "spins": spin, "behind": dict}


def crash(machine):
    def die():
        print("dying", flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)

    return {"before": lambda: {"core": resource.getrlimit(resource.RLIMIT_CORE)[0]}, "dies": die, "behind": dict}
