// The videos of one clip, in an element with data-together, follow the one that has controls.
const follow = (type, act) =>
  document.addEventListener(type, ({ target }) => {
    const group = target instanceof HTMLVideoElement && target.controls && target.closest("[data-together]");
    for (const other of group ? group.querySelectorAll("video") : []) if (other !== target) act(target, other);
  }, true);

const meet = (video, other) => {
  // While they play, less than a frame apart is together.
  const near = video.paused ? 0.001 : 0.04;
  if (Math.abs(video.currentTime - other.currentTime) > near) other.currentTime = video.currentTime;
};
follow("play", (video, other) => { meet(video, other); other.play().catch(() => {}); });
follow("pause", (video, other) => { other.pause(); meet(video, other); });
follow("seeked", meet);
follow("ratechange", (video, other) => { other.playbackRate = video.playbackRate; });
