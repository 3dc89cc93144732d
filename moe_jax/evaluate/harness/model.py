"""Adapts a checkpoint to lm_eval's LM interface; the only module that subclasses lm_eval."""

from lm_eval.api.model import LM

from moe_jax.evaluate.harness.requests import Answerer


class CheckpointLM(LM):
  """A checkpoint as an lm_eval model; all requests of a call are answered in batches."""

  def __init__(self, answerer: Answerer):
    super().__init__()
    self._answerer = answerer
    self.error: Exception | None = None  # raised by the model, not by a task

  def loglikelihood(self, requests):
    return self._answer("loglikelihood", requests, lambda: [
        tuple(score) for score in self._answerer.loglikelihood([each.args for each in requests])])

  def loglikelihood_rolling(self, requests):
    return self._answer("loglikelihood_rolling", requests, lambda: (
        self._answerer.loglikelihood_rolling([each.args[0] for each in requests])))

  def generate_until(self, requests):
    return self._answer("generate_until", requests, lambda: self._answerer.generate_until(
        [each.args for each in requests]))

  def _answer(self, method, requests, work):
    try:
      answers = work()
    except Exception as error:
      self.error = error
      raise
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial(method, request.args, answer)
    return answers
