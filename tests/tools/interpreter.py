"""Triton's interpreter, with less to do.

It puts its functions into triton.language when a kernel is launched, and once more at each call of
a device function, though they are there already. That is a third of the time of a launch.
"""

from triton.runtime import interpreter


def patch_once():
    """Let a launch patch triton.language once for each namespace that its functions have.

    Nothing is changed where another version of Triton does this in another way.
    """
    if not hasattr(interpreter, "_patch_lang") or not hasattr(interpreter, "GridExecutor"):
        return
    real_launch = interpreter.GridExecutor.__call__
    real_patch = interpreter._patch_lang
    patched = set()  # by id: the global names of functions of the launch that is under way

    def launch(executor, *args, **options):
        patched.clear()
        return real_launch(executor, *args, **options)

    def patch(function):
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return real_patch(function)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch
