// The videos of one clip, in an element with data-together, play together.
const others = (video) => {
  const group = video.closest("[data-together]");
  return group ? [...group.querySelectorAll("video")].filter((each) => each !== video) : [];
};
const follow = (type, act) =>
  document.addEventListener(type, (event) => {
    if (event.target instanceof HTMLVideoElement) others(event.target).forEach((each) => act(event.target, each));
  }, true);

const meet = (video, other) => {
  if (Math.abs(video.currentTime - other.currentTime) > 0.04) other.currentTime = video.currentTime;
};
follow("play", (video, other) => { if (other.paused) { meet(video, other); other.play().catch(() => {}); } });
follow("pause", (video, other) => { if (!video.seeking && !other.paused) { other.pause(); meet(video, other); } });
follow("seeked", meet);
follow("ratechange", (video, other) => { if (other.playbackRate !== video.playbackRate) other.playbackRate = video.playbackRate; });
