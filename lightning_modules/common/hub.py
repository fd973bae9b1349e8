"""Whether the Hugging Face hub can be reached."""


def hub_answers() -> bool:
    """Return whether the Hugging Face hub answers one request within ten seconds.

    The hub's own library retries for most of a minute where there is no network. It is also told not to look by
    `HF_HUB_OFFLINE=1`, and then this returns false at once.
    """
    from huggingface_hub import constants, get_session  # imported where used: it is slow to import

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # no network, or offline mode
        return False
    return True
