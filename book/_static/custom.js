// Ages are told when the page is read, not when it was built.
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("time.age").forEach(time => {
  const days = Math.floor((Date.now() - new Date(time.dateTime)) / 864e5);
  time.textContent += days < 1 ? " (today)" : days === 1 ? " (yesterday)" : ` (${days} days ago)`;
}));
