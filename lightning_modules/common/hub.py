"""Whether the Hugging Face hub can be reached."""


def hub_answers() -> bool:
    """Return whether the Hugging Face hub answers one request within ten seconds.

    Without a network, the hub's own library would retry for most of a minute. With `HF_HUB_OFFLINE=1` the result is
    false at once.
    """
    from huggingface_hub import constants, get_session  # imported where used: it is slow to import

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # no network, or offline mode
        return False
    return True
